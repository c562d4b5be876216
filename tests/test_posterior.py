"""The exact posterior of a grammar against a sum over all its sentences."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from text_diffusion.grammar import Grammar
from text_diffusion.tokenizer import Tokenizer, train_word_level

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from posterior import Posterior

# A slot given another, one given that, one given the first too, an independent one, and a name that returns.
GRAMMAR = Grammar(
    "{name} has {count} {animal} that {eats} {food}, says {name}.",
    {
        "name": {"Anna": 3, "Ben": 1, "Ida": 2},
        "count": {"a": 2, "two": 1},
        "animal": {
            "given": "count",
            "cases": [
                {"when": ["a"], "words": {"cow": 2, "cat": 1}},
                {"when": ["two"], "words": {"cows": 1, "cats": 3}},
            ],
        },
        "eats": {
            "given": "animal",
            "cases": [
                {"when": ["cow"], "words": {"chews": 1, "eats": 4}},
                {"when": ["cat"], "words": {"eats": 1}},
                {"when": ["cows", "cats"], "words": {"chew": 1, "eat": 2}},
            ],
        },
        "food": {
            "given": "animal",
            "cases": [
                {"when": ["cow", "cows"], "words": {"hay": 1, "grass": 2}},
                {"when": ["cat", "cats"], "words": {"fish": 1, "grass": 5}},
            ],
        },
    },
)


@pytest.fixture(scope="module")
def everything() -> tuple[Tokenizer, torch.Tensor, torch.Tensor]:
    """A tokenizer, all sentences (N, L) and their log P (N,)."""
    words = [slot.words for slot in (GRAMMAR.slots[name] for name in GRAMMAR.places)]
    rows = np.stack(np.meshgrid(*(np.arange(len(w)) for w in words), indexing="ij"), axis=-1).reshape(-1, len(words))
    log_p = GRAMMAR.log2_probs(rows) * np.log(2)
    rows, log_p = rows[np.isfinite(log_p)], log_p[np.isfinite(log_p)]
    lines = GRAMMAR.decode(rows)
    tokenizer = train_word_level(lines)
    return tokenizer, torch.tensor(tokenizer.encode(lines)), torch.from_numpy(log_p)


@pytest.mark.parametrize("strength", [0.0, 1.0, 5.0, 400.0])
def test_it_is_the_sum_over_all_sentences(
    everything: tuple[Tokenizer, torch.Tensor, torch.Tensor], strength: float
) -> None:
    tokenizer, ids, log_p = everything
    scores = strength * torch.randn(7, ids.shape[1], tokenizer.vocab_size, generator=torch.manual_seed(1))
    posterior = Posterior(GRAMMAR, tokenizer)
    # Every sentence's: log P(w) and the scores of its words, at the places of slots.
    at = torch.tensor([position for position, _ in posterior.places])
    joint = log_p + torch.stack([scores.double()[:, p, ids[:, p]] for p in at.tolist()]).sum(dim=0)  # (7, N)
    weights = joint.softmax(dim=1)
    for (position, words), found in zip(posterior.places, posterior.marginals(scores), strict=True):
        p = torch.stack([weights[:, ids[:, position] == word].sum(dim=1) for word in words.tolist()], dim=1)
        torch.testing.assert_close(found.exp(), p, rtol=1e-9, atol=1e-12)


def test_what_it_says_of_whole_sentences(everything: tuple[Tokenizer, torch.Tensor, torch.Tensor]) -> None:
    tokenizer, ids, log_p = everything
    posterior = Posterior(GRAMMAR, tokenizer)
    scores = torch.zeros(len(ids), ids.shape[1], tokenizer.vocab_size)
    p = log_p.exp()
    marginal = [sum(p[ids[:, at] == ids[i, at]].sum().log() for at, _ in posterior.places) for i in range(len(ids))]
    torch.testing.assert_close(posterior.nll(scores, ids), -torch.stack(marginal))  # type: ignore[arg-type]
    E = torch.randn(tokenizer.vocab_size, 5, generator=torch.manual_seed(2))
    mean = (p[:, None, None] * E[ids].double()).sum(dim=0)
    torch.testing.assert_close(posterior.x_start(scores[:1], E)[0], mean.float())
