"""Minimum Bayes risk: of several candidates the one that is nearest to the others (Kumar & Byrne 2004), by BLEU."""

from __future__ import annotations

from collections.abc import Sequence

from text_diffusion.errors import UserError


def check_bleu() -> None:
    """Find out before the work whether BLEU is there.

    Raises:
        UserError: the library is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise UserError(
            "--mbr needs a library that is not there: pip install sacrebleu (extra eval), or leave --mbr out"
        ) from None


def best_of(candidates: Sequence[str], k: int) -> list[str]:
    """Of every k sentences in a row the one whose mean BLEU with the others is greatest; the first of equals."""
    return [most_agreed(candidates[start : start + k]) for start in range(0, len(candidates), k)]


def most_agreed(candidates: Sequence[str]) -> str:
    """One of the candidates."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)

    def agreement(i: int) -> float:
        others = [other for j, other in enumerate(candidates) if j != i]
        return sum(bleu.sentence_score(candidates[i], [other]).score for other in others)

    return candidates[max(range(len(candidates)), key=agreement)]
