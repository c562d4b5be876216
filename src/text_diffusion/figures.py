"""The figures of a text beside those of held-out real text and of an ideal sampler, each with its 95 % interval.

Half of the reference is the *real text*: it is measured as if a sampler had written it. The other
half is the *other real text* that both are compared with. A figure that depends on how many lines it is taken from is
taken from equally many of both.

Intervals come from random halves: the standard deviation of a figure over halves of the lines, drawn without
replacement, is that of the figure itself (for a mean exactly: (sigma^2 / (n/2)) (1 - 1/2) = sigma^2 / n). The usual
bootstrap draws lines with replacement, and its doubles look like the repetitions that half of the figures count. All
halves are of whole runs of lines, as neighbours may be about the same thing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from text_diffusion import embedding, metrics
from text_diffusion.grammar import Grammar
from text_diffusion.metrics import Z95, Floats
from text_diffusion.ngrams import Ints, Lines, words_of

HALVES = 100  # random halves behind an interval
IDEAL_DRAWS = 20  # texts of an ideal sampler behind a figure of its that has no closed form
REFERENCE_RUNS = 10  # runs of neighbouring lines that the reference is halved by
INTERVAL_RUNS = 40  # likewise the lines behind an interval
EMBEDDED = 1000  # lines at most whose distances are taken
CLUSTER_LINES = 20  # lines to a cluster of MAUVE
FEW_KNOWN = 0.5  # share of known words below which a warning is due
FEWEST = 20  # lines below which no figure means anything

Measure = Callable[[Ints, np.random.Generator], "Estimate"]
Scorer = Callable[[Sequence[str]], tuple[Floats, Ints]]  # lines -> -log2 P(line) and tokens of each line


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def within(self, least: float, most: float) -> Estimate:
        """The interval without what is impossible."""
        return replace(self, low=max(self.low, least), high=min(self.high, most))


@dataclass(frozen=True)
class Figure:
    """What is measured: a stable key, a title, "%" or another unit, and which values are good.

    good: "high", "low", or "real": the nearer to real text the better, as more can be as wrong as less.
    needs: lines below which it is left out.
    sized: whether it depends on the number of lines.
    most: lines at most that it is taken from.
    """

    key: str
    title: str
    unit: str
    good: str
    needs: int = FEWEST
    sized: bool = True
    most: int = sys.maxsize


FIGURES = {
    figure.key: figure
    for figure in (
        Figure("valid", "valid sentences of the language", "%", "high", sized=False),
        Figure("slot_kl", "KL of slots from the language, summed", "bits", "low"),
        Figure("mutual_information", "mutual information of slots, summed", "bits", "real", needs=200),
        Figure("unique", "unique lines", "%", "real"),
        Figure("novel", "novel lines, not in the training text", "%", "high", sized=False),
        Figure("blank", "blank lines", "%", "low", sized=False),
        Figure("entropy", "unigram entropy", "bits", "real"),
        Figure("distinct_1", "distinct words", "%", "real"),
        Figure("distinct_2", "distinct word pairs", "%", "real"),
        Figure("distinct_3", "distinct word triples", "%", "real"),
        Figure("self_bleu", "self-BLEU", "%", "real"),
        Figure("repetition", "word pairs repeated in a line", "%", "low", sized=False),
        Figure("js_1", "words: Jensen-Shannon distance", "", "low"),
        Figure("js_2", "word pairs: Jensen-Shannon distance", "", "low"),
        Figure("js_3", "word triples: Jensen-Shannon distance", "", "low"),
        Figure("length", "distance of the lengths", "words", "low"),
        Figure("energy", "energy distance of embeddings", "", "low", needs=50, most=EMBEDDED),
        Figure("mauve", "MAUVE", "", "high", needs=200, most=EMBEDDED),
        Figure("perplexity", "perplexity under the teacher", "", "low", sized=False),
    )
}


@dataclass(frozen=True)
class Row:
    """A figure of the samples, of real text and of an ideal sampler, as far as there is one."""

    figure: Figure
    samples: Estimate
    real: Estimate | None
    ideal: Estimate | None

    @property
    def bar(self) -> Estimate:
        """What the samples are held to."""
        bar = self.ideal or self.real
        assert bar is not None, "a figure with nothing beside it is left out"
        return bar

    @property
    def worse(self) -> bool:
        """Whether the samples are worse than the bar and the intervals do not meet."""
        below, above = self.samples.high < self.bar.low, self.samples.low > self.bar.high
        return {"high": below, "low": above, "real": below or above}[self.figure.good]


@dataclass
class Evaluation:
    """All figures of a text; `left_out` says of the others why they are not there."""

    lines: int
    real_lines: int
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def row(self, key: str) -> Row:
        """The row of a figure."""
        return next(row for row in self.rows if row.figure.key == key)


# Estimates


def halves_of(rows: Ints, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Random halves, each of whole runs of neighbouring rows: neighbours may be about the same thing."""
    runs = np.array_split(rows, min(count, len(rows)))
    order = rng.permutation(len(runs))
    chosen = [np.sort(half) for half in (order[: len(runs) // 2], order[len(runs) // 2 :])]
    first, second = (np.concatenate([rows[:0], *(runs[i] for i in half)]) for half in chosen)
    return first, second


def of_share(count: Callable[[Ints], int]) -> Measure:
    """A share of the lines, with Wilson's interval, as halves that are all alike would give none."""

    def measure(rows: Ints, rng: np.random.Generator) -> Estimate:
        hits = count(rows)
        return Estimate(hits / len(rows), *metrics.wilson(hits, len(rows)))

    return measure


def share(flags: NDArray[np.bool_]) -> Measure:
    """The share of lines that are flagged."""
    return of_share(lambda rows: int(flags[rows].sum()))


def by_halves(statistic: Callable[[Ints], float]) -> Measure:
    """Any figure of the lines, with the interval from random halves."""

    def measure(rows: Ints, rng: np.random.Generator) -> Estimate:
        halves = [statistic(halves_of(rows, INTERVAL_RUNS, rng)[0]) for _ in range(HALVES)]
        finite = [value for value in halves if math.isfinite(value)]
        if len(finite) < 2:
            return Estimate(math.nan, math.nan, math.nan)
        value, error = statistic(rows), Z95 * float(np.std(finite, ddof=1))
        return Estimate(value, value - error, value + error)

    return measure


# The suite


def evaluate(
    samples: Sequence[str],
    reference: Sequence[str],
    *,
    train: Sequence[str] | None = None,
    grammar: Grammar | None = None,
    scorer: Scorer | None = None,
    seed: int = 0,
) -> Evaluation:
    """All figures that there is enough for.

    Args:
        samples: lines to judge; a blank one is a sentence without words, which only `blank` counts.
        reference: held-out real lines.
        train: training lines, for `novel`.
        grammar: of the language, if it is known.
        scorer: -log2 P and tokens of lines under a teacher, for `perplexity`.
        seed: of the halves, and of what else is drawn.
    """

    def rng(purpose: str) -> np.random.Generator:  # one each, so that no figure depends on which others there are
        return np.random.default_rng([seed, *purpose.encode()])

    runs = halves_of(np.arange(len(reference)), REFERENCE_RUNS, rng("reference"))
    halves = ([reference[i] for i in half] for half in runs)
    drawn = [] if grammar is None else grammar.sample(len(samples), rng("ideal"))  # what an ideal sampler would write
    lines = Lines(samples, *halves, drawn)
    all_samples, real, other, all_drawn = lines.texts
    blank = np.array([not line.strip() for line in lines.lines], dtype=bool)
    written = all_samples[~blank[all_samples]]
    result = Evaluation(len(samples), len(real), warnings=_warnings(samples, [*reference, *(train or ())]))

    measures = {"blank": share(blank)} | _of_words(lines, other)
    ideal: dict[str, Estimate] = {}
    if grammar is not None:
        ids = grammar.encode(lines.lines)
        measures |= _of_language(grammar, ids)
        if len(written) and ids[written].max() < 0 and not result.warnings:
            result.warnings.append(
                f"no line is spelled as the language is, for example {reference[0]!r}: are spaces or upper case other?"
            )
        ideal = ideal_figures(grammar, len(written), train, rng("ideal figures")) if len(written) else {}
    else:
        reason = "the language is not known (no grammar.json in the folder of the reference's name, no --grammar FILE)"
        _leave_out(result, reason, "valid", "slot_kl", "mutual_information")
    if train is not None:
        known = set(train)
        measures["novel"] = share(np.array([line not in known for line in lines.lines], dtype=bool))
    else:
        _leave_out(result, "the training text is not known (--train FILE)", "novel")
    try:
        measures |= _of_embeddings(embedding.embed(lines.lines), lines.texts[:3], rng("embeddings"))
    except ImportError as error:
        reason = f"{error.name} is not there, of the extra eval: pip install '.[eval]' in the repository"
        _leave_out(result, reason, "energy", "mauve")
    if scorer is not None:
        measures["perplexity"] = _perplexity(*scorer(lines.lines))
    else:
        _leave_out(result, "no teacher is given (--checkpoint CKPT)", "perplexity")

    for key, figure in FIGURES.items():
        if key in measures:
            texts = (all_samples, real, all_drawn[:0]) if key == "blank" else (written, real, all_drawn)
            _measure(result, figure, measures[key], texts, ideal.get(key), rng(key))
    return result


def _measure(
    result: Evaluation,
    figure: Figure,
    measure: Measure,
    texts: tuple[Ints, Ints, Ints],
    ideal: Estimate | None,
    rng: np.random.Generator,
) -> None:
    """Add the row of a figure, of equally many lines where that matters, or the reason why it is left out.

    Args:
        texts: lines of the samples, of real text and, if the language is known, of an ideal sampler.
        ideal: what an ideal sampler's is expected to be, if there is a closed form; else it is measured.
    """
    rows, real, drawn = texts if ideal is None else (*texts[:2], texts[2][:0])
    if figure.sized and ideal is not None:
        real = real[:0]  # the ideal sampler wrote as many lines as the samples have; real text has another number
    elif figure.sized:
        size = min(len(rows), len(real), figure.most)
        rows, real, drawn = (np.sort(rng.permutation(lines)[:size]) for lines in (rows, real, drawn))
    if len(rows) < figure.needs or (ideal is None and len(real) < figure.needs):
        _leave_out(result, f"needs {figure.needs} lines of samples, and twice as many of the reference", figure.key)
        return

    def of(lines: Ints) -> Estimate | None:
        found = measure(lines, rng) if len(lines) >= figure.needs else None
        if found is None or not math.isfinite(found.value):
            return None
        return found.within(0, 1) if figure.unit == "%" or figure.key == "mauve" else found

    found, beside, ideal = of(rows), of(real), ideal or of(drawn)
    if found is not None and (beside or ideal) is not None:
        result.rows.append(Row(figure, found, beside, ideal))
    else:
        reason = "nothing to count: too few lines are long enough, or have the shape of the language"
        _leave_out(result, reason, figure.key)


def ideal_figures(
    grammar: Grammar, n: int, train: Sequence[str] | None, rng: np.random.Generator
) -> dict[str, Estimate]:
    """What n lines of an ideal sampler are expected to give: exact, or the mean of IDEAL_DRAWS texts."""

    def exact(value: float) -> Estimate:
        return Estimate(value, value, value)

    def mean(values: Sequence[float]) -> Estimate:
        centre, error = float(np.mean(values)), Z95 * float(np.std(values, ddof=1)) / len(values) ** 0.5
        return Estimate(centre, centre - error, centre + error)

    draws = [grammar.sample_ids(n, rng) for _ in range(IDEAL_DRAWS)]
    found = {
        "valid": exact(1.0),
        "slot_kl": mean([grammar.slot_kl_bits(ids) for ids in draws]),
        "mutual_information": mean([grammar.mutual_information_bits(ids) for ids in draws]),
        "unique": exact(grammar.expected_unique(n)),
    }
    return found | ({} if train is None else {"novel": exact(grammar.expected_novel(train))})


def _of_words(lines: Lines, other: Ints) -> dict[str, Measure]:
    def lengths(rows: Ints) -> Ints:
        return lines.ngrams[0].lengths[rows]

    def distinct(n: int) -> Measure:
        return by_halves(lambda rows: metrics.distinct(lines.ngrams[n - 1].take(rows)))

    def js_distance(n: int) -> Measure:
        theirs = lines.counts(n, other)
        return by_halves(lambda rows: metrics.js_distance(lines.counts(n, rows), theirs))

    return {
        "unique": of_share(lambda rows: len(np.unique(lines.ids[rows]))),
        "entropy": by_halves(lambda rows: metrics.entropy_bits(lines.counts(1, rows))),
        "self_bleu": by_halves(lambda rows: metrics.self_bleu([ngrams.take(rows) for ngrams in lines.ngrams])),
        "repetition": by_halves(lambda rows: metrics.repetition(lines.ngrams[1].take(rows))),
        "length": by_halves(lambda rows: metrics.length_distance(lengths(rows), lengths(other))),
        **{f"distinct_{n}": distinct(n) for n in (1, 2, 3)},
        **{f"js_{n}": js_distance(n) for n in (1, 2, 3)},
    }


def _of_language(grammar: Grammar, ids: Ints) -> dict[str, Measure]:
    shaped = ids.min(axis=1, initial=0) >= 0

    def of_slots(key: str, statistic: Callable[[Ints], float]) -> Measure:
        measure = by_halves(lambda rows: statistic(ids[rows]))
        enough = FIGURES[key].needs
        return lambda rows, rng: measure(rows, rng) if shaped[rows].sum() >= enough else Estimate(*[math.nan] * 3)

    return {
        "valid": share(np.isfinite(grammar.log2_probs(ids))),
        "slot_kl": of_slots("slot_kl", grammar.slot_kl_bits),
        "mutual_information": of_slots("mutual_information", grammar.mutual_information_bits),
    }


def _of_embeddings(x: Floats, texts: Sequence[Ints], rng: np.random.Generator) -> dict[str, Measure]:
    """Of embeddings (n, D): distances to the other real text, and clusters of all three texts together."""
    some = [rng.permutation(rows)[:EMBEDDED] for rows in texts]
    other = some[-1]
    within = metrics.distances(x[other], x[other])
    centres = metrics.k_means(x[np.concatenate(some)], max(2, len(other) // CLUSTER_LINES), rng)
    cluster = metrics.distances(x, centres).argmin(axis=1)

    def energy(rows: Ints) -> float:
        own, across = metrics.distances(x[rows], x[rows]), metrics.distances(x[rows], x[other])
        return metrics.energy_distance(own, across, within)

    def mauve(rows: Ints) -> float:
        p, q = (np.bincount(cluster[chosen], minlength=len(centres)) for chosen in (rows, other))
        return metrics.mauve(p, q)

    return {"energy": by_halves(energy), "mauve": by_halves(mauve)}


def _perplexity(bits: Floats, tokens: Ints) -> Measure:
    return by_halves(lambda rows: float(2 ** (bits[rows].sum() / tokens[rows].sum())))


def _leave_out(result: Evaluation, reason: str, *keys: str) -> None:
    result.left_out |= dict.fromkeys(keys, reason)


def _warnings(samples: Sequence[str], real: Sequence[str]) -> list[str]:
    """Of samples in another spelling or tokenisation than the real text, where few figures mean what they say."""
    known = {word for line in real for word in words_of(line)}
    words = [word for line in samples for word in words_of(line)]
    met = sum(word in known for word in words) / max(len(words), 1)
    if not words or met >= FEW_KNOWN:
        return []
    folded = {word.casefold() for word in known}
    if sum(word.casefold() in folded for word in words) >= FEW_KNOWN * len(words):
        return [
            f"only {100 * met:.1f} % of the samples' words occur in the real text as they are written there: upper \
and lower case differ, so that the comparison says little"
        ]
    return [
        f"only {100 * met:.1f} % of the samples' words occur in the real text: another language or tokenisation, so \
that the comparison says little"
    ]
