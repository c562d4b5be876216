"""Each figure against scipy, sacrebleu or a count by hand; the intervals against what they should cover."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from scipy.integrate import quad
from scipy.spatial.distance import cdist, jensenshannon
from scipy.stats import binomtest, entropy, wasserstein_distance

from text_diffusion import metrics
from text_diffusion.figures import by_halves, share
from text_diffusion.ngrams import Lines, Rows, words_of

RNG = np.random.default_rng(0)
TEXT = [
    "the cat sat on the mat",
    "the cat sat on the cat",
    "a dog",
    "a dog",
    "yes",
    "the the the the the",
    "a dog sat on the mat and the cat sat on it",
    "nothing in common here at all",
]


def random_lines(n: int, rng: np.random.Generator, words: str = "abcdefgh") -> list[str]:
    return [" ".join(rng.choice(list(words), size=rng.integers(1, 9))) for _ in range(n)]


# Lines as numbers


def test_words_of_a_line() -> None:
    assert words_of("It's 5 out of 5, kid-friendly.") == words_of("It ' s 5 out of 5 , kid - friendly .")
    assert words_of("Café İstanbul\t!") == ["Café", "İstanbul", "!"]
    assert words_of("  ") == []


def test_ngrams_are_those_of_the_words() -> None:
    lines = Lines(TEXT[:3], TEXT[3:])
    assert [len(rows) for rows in lines.texts] == [3, 5]
    for n, ngrams in enumerate(lines.ngrams, 1):
        expected = [[tuple(line.split()[i:][:n]) for i in range(len(line.split()) - n + 1)] for line in TEXT]
        names: dict[int, tuple[str, ...]] = {}
        for row, there in zip(range(len(TEXT)), expected, strict=True):
            found = ngrams.take(np.array([row])).values.tolist()
            assert [names.setdefault(number, name) for number, name in zip(found, there, strict=True)] == there
        assert len(set(names.values())) == len(names)  # no two n-grams share a number


def test_rows_take_in_any_order() -> None:
    rows = Rows.of([[1, 2], [], [3], [4, 5, 6]])
    taken = rows.take(np.array([3, 1, 0, 3]))
    assert taken.values.tolist() == [4, 5, 6, 1, 2, 4, 5, 6]
    assert taken.lengths.tolist() == [3, 0, 2, 3]
    assert taken.owners.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert rows.take(np.array([], dtype=np.int64)).values.tolist() == []


# Frequencies


def test_entropy_and_divergences_agree_with_scipy() -> None:
    p, q = RNG.integers(0, 9, size=(2, 50))
    assert metrics.entropy_bits(p) == pytest.approx(entropy(p, base=2))
    assert metrics.kl_bits(p, q + 1) == pytest.approx(entropy(p, q + 1, base=2))
    assert metrics.js_distance(p, q) == pytest.approx(jensenshannon(p, q, base=2))
    assert metrics.kl_bits(np.array([1, 1]), np.array([1, 0])) == math.inf
    assert metrics.js_distance(np.array([1, 0]), np.array([0, 5])) == 1
    assert metrics.js_distance(p, 3 * p) == pytest.approx(0, abs=1e-7)
    assert metrics.entropy_bits(np.array([7, 0])) == 0


def test_mutual_information() -> None:
    joint = RNG.integers(0, 9, size=(6, 4))
    product = np.outer(joint.sum(1), joint.sum(0))
    assert metrics.mutual_information_bits(joint) == pytest.approx(entropy(joint.ravel(), product.ravel(), base=2))
    assert metrics.mutual_information_bits(product) == pytest.approx(0, abs=1e-9)
    assert metrics.mutual_information_bits(np.diag([2, 2, 2, 2])) == pytest.approx(2)


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (30, 30), (1, 30), (17, 30), (9999, 10_000)])
def test_wilson_agrees_with_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert metrics.wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


# Lines


def test_distinct_repetition_and_unique_by_hand() -> None:
    lines = Lines(["a b a b", "a b", "c", "a b"])
    assert metrics.distinct(lines.ngrams[0]) == 3 / 9
    assert metrics.distinct(lines.ngrams[1]) == 2 / 5  # ab ba ab | ab | | ab
    assert metrics.repetition(lines.ngrams[1]) == pytest.approx(1 / 5)
    assert metrics.repetition(lines.ngrams[0]) == pytest.approx(2 / 9)
    assert len(set(lines.ids.tolist())) == 3
    assert math.isnan(metrics.distinct(lines.ngrams[1].take(np.array([2]))))


def test_length_distance_agrees_with_scipy() -> None:
    a, b = RNG.integers(1, 30, size=200), RNG.integers(3, 12, size=77)
    assert metrics.length_distance(a, b) == pytest.approx(wasserstein_distance(a, b))


@pytest.mark.parametrize("lines", [TEXT, TEXT[2:4], TEXT[4:6], random_lines(40, RNG), random_lines(5, RNG, "ab")])
def test_self_bleu_agrees_with_sacrebleu(lines: list[str]) -> None:
    bleu = BLEU(effective_order=True, tokenize="none")
    scores = [bleu.sentence_score(line, lines[:i] + lines[i + 1 :]).score for i, line in enumerate(lines)]
    assert metrics.self_bleu(Lines(lines).ngrams) == pytest.approx(np.mean(scores) / 100)


def test_self_bleu_of_nothing_but_copies_is_one() -> None:
    assert metrics.self_bleu(Lines(["the cat sat on the mat"] * 3).ngrams) == pytest.approx(1)
    assert math.isnan(metrics.self_bleu(Lines(["the cat"]).ngrams))


def test_matches_elsewhere_by_brute_force() -> None:
    lines = random_lines(30, RNG, "abc")
    rows = Lines(lines).ngrams[0]
    counts = [Counter(line.split()) for line in lines]
    expected = [
        sum(min(c, max(other[word] for j, other in enumerate(counts) if j != i)) for word, c in own.items())
        for i, own in enumerate(counts)
    ]
    assert metrics.matches_elsewhere(rows).tolist() == expected


def test_closest_other_by_brute_force() -> None:
    lengths = np.array([1, 5, 5, 9, 7, 20])
    expected = [
        min((abs(a - b), b) for j, b in enumerate(lengths) if j != i)[1] for i, a in enumerate(lengths.tolist())
    ]
    assert metrics.closest_other(lengths).tolist() == expected


# Embeddings


def test_distances_agree_with_scipy() -> None:
    a, b = RNG.normal(size=(7, 5)), RNG.normal(size=(9, 5))
    np.testing.assert_allclose(metrics.distances(a, b), cdist(a, b))


def test_energy_distance_by_its_definition() -> None:
    a, b = RNG.normal(size=(12, 3)), RNG.normal(size=(9, 3)) + 1
    within = [np.mean([math.dist(x, y) for x, y in combinations(rows, 2)]) for rows in (a, b)]
    across = np.mean([math.dist(x, y) for x in a for y in b])
    found = metrics.energy_distance(metrics.distances(a, a), metrics.distances(a, b), metrics.distances(b, b))
    assert found == pytest.approx(2 * across - within[0] - within[1])


def test_energy_distance_is_unbiased() -> None:
    """For two samples of one distribution the mean is 0; 300 repetitions, 5 standard errors."""
    draws = [RNG.normal(size=(2, 10, 2)) for _ in range(300)]
    found = [metrics.energy_distance(*(metrics.distances(x, y) for x, y in ((a, a), (a, b), (b, b)))) for a, b in draws]
    assert abs(np.mean(found)) < 5 * np.std(found) / math.sqrt(300)


@pytest.mark.parametrize("seed", range(3))
def test_mauve_is_the_area_under_the_frontier(seed: int) -> None:
    """Against adaptive quadrature of the curve with scipy's relative entropies."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(8), size=2)

    def x(weight: float) -> float:
        return math.exp(-5 * entropy(q, weight * p + (1 - weight) * q))

    def y(weight: float) -> float:
        return math.exp(-5 * entropy(p, weight * p + (1 - weight) * q))

    def height_times_step(weight: float) -> float:
        h = 1e-6
        return y(weight) * (x(weight + h) - x(weight - h)) / (2 * h)

    # x falls from 1 at weight 0; beyond the curve's left end the frontier is level, up to the corner (0, 1)
    area = -quad(height_times_step, 1e-5, 1 - 1e-5, limit=200)[0] + x(1) * (1 + y(1)) / 2
    assert metrics.mauve(p, q) == pytest.approx(area, abs=0.01)


def test_mauve_of_extremes() -> None:
    p = np.array([3, 1, 0, 0])
    assert metrics.mauve(p, 2 * p) == pytest.approx(1)
    assert metrics.mauve(p, p[::-1]) < 0.1
    assert metrics.mauve(p, p + 1) == pytest.approx(metrics.mauve(p + 1, p), abs=1e-3)  # symmetric


def test_k_means_finds_what_is_apart() -> None:
    x = np.concatenate([RNG.normal(size=(40, 3)) / 10 + centre for centre in (0, 5, 10)])
    centres = metrics.k_means(x, 3, np.random.default_rng(0))
    assert sorted(centres.mean(axis=1)) == pytest.approx([0, 5, 10], abs=0.1)
    assert len(metrics.k_means(np.repeat(x[:2], 10, axis=0), 5, np.random.default_rng(0))) == 2


# Intervals


def test_halves_give_the_standard_error_of_a_mean() -> None:
    x = RNG.normal(size=1000)
    estimate = by_halves(lambda rows: float(x[rows].mean()))(np.arange(1000), np.random.default_rng(0))
    expected = metrics.Z95 * x.std(ddof=1) / math.sqrt(1000)
    assert estimate.value == pytest.approx(x.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(expected, rel=0.25)  # 100 halves: 7 % standard error


@pytest.mark.parametrize("statistic", ["entropy", "distinct", "self_bleu"])
def test_intervals_cover(statistic: str) -> None:
    """Of 60 texts of one language, the interval holds the mean figure in at least 80 % (nominally 95 %).

    A coverage of 95 % falls below 80 % of 60 with a probability of 2e-5.
    """

    def measure(seed: int) -> tuple[float, float, float]:
        lines = Lines(random_lines(200, np.random.default_rng(seed)))
        functions = {
            "entropy": lambda rows: metrics.entropy_bits(lines.counts(1, rows)),
            "distinct": lambda rows: metrics.distinct(lines.ngrams[2].take(rows)),
            "self_bleu": lambda rows: metrics.self_bleu([ngrams.take(rows) for ngrams in lines.ngrams]),
        }
        estimate = by_halves(functions[statistic])(lines.texts[0], np.random.default_rng(seed))
        return estimate.low, estimate.value, estimate.high

    low, value, high = np.array([measure(seed) for seed in range(60)]).T
    assert np.mean((low <= value.mean()) & (value.mean() <= high)) >= 0.8


def test_shares_of_nothing_and_of_all_have_an_interval() -> None:
    flags = np.array([True] * 30 + [False] * 30)
    rng = np.random.default_rng(0)
    assert share(flags)(np.arange(30), rng).low == pytest.approx(0.886, abs=1e-3)
    assert share(flags)(np.arange(30, 60), rng).high == pytest.approx(0.114, abs=1e-3)
    assert share(flags)(np.arange(60), rng).value == 0.5


def test_wilson_reaches_the_share() -> None:
    """Whatever is rounded: a perfect text is no worse than a perfect one, nor an empty share above none."""
    for n in range(1, 3000):
        assert metrics.wilson(n, n)[1] == 1.0
        assert metrics.wilson(0, n)[0] == 0.0
