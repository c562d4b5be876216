"""What a text can be measured by: small pure functions of counts, of rows of n-grams and of distance matrices.

docs/evaluation.md says what each figure can and cannot tell.

    c, p, q     (V,)      counts or frequencies of V things; they need not sum to 1
    ngrams      Rows      a row of numbers for each line: its n-grams (1-grams are words)
    n           lines
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from text_diffusion.ngrams import Ints, Rows

Floats = NDArray[np.float64]
Counts = NDArray[Any]  # whole numbers or weights
Z95 = 1.959964  # standard deviations to either side that hold 95 % of a normal distribution


# Frequencies


def entropy_bits(c: Counts) -> float:
    """- sum_i p_i log2 p_i of the frequencies p."""
    p = np.asarray(c, float)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log2(p)).sum()) + 0.0  # + 0.0: one word only has entropy 0, not -0


def kl_bits(p: Counts, q: Counts) -> float:
    """KL(p || q) = sum_i p_i log2(p_i / q_i); infinite where q_i = 0 < p_i."""
    p, q = np.asarray(p, float), np.asarray(q, float)
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore"):
        return float((p[p > 0] * np.log2(p[p > 0] / q[p > 0])).sum())


def js_distance(p: Counts, q: Counts) -> float:
    """Square root of the Jensen-Shannon divergence in bits: 0 alike, 1 nothing in common (Endres, Schindelin 2003)."""
    p, q = np.asarray(p, float), np.asarray(q, float)
    if not p.any() or not q.any():
        return math.nan
    middle = p / p.sum() + q / q.sum()
    return math.sqrt(max(0.0, (kl_bits(p, middle) + kl_bits(q, middle)) / 2))


def mutual_information_bits(joint: Counts) -> float:
    """I(i; j) of a table (V_i, V_j) of joint counts."""
    joint = np.asarray(joint, float)
    return max(0.0, entropy_bits(joint.sum(0)) + entropy_bits(joint.sum(1)) - entropy_bits(joint.ravel()))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share, sensible also for 0 and for n hits (Wilson 1927)."""
    p, z = hits / n, Z95**2 / n
    centre, half = (p + z / 2) / (1 + z), math.sqrt(p * (1 - p) * z + z**2 / 4) / (1 + z)
    return (centre - half if hits else 0.0), (centre + half if hits < n else 1.0)  # exactly, not but for rounding


# Lines


def distinct(ngrams: Rows) -> float:
    """distinct-n: share of different ones among all n-grams (Li et al. 2016, arXiv 1510.03055)."""
    return len(np.unique(ngrams.values)) / len(ngrams.values) if len(ngrams.values) else math.nan


def repetition(ngrams: Rows) -> float:
    """Share of n-grams that their own line has already had (seq-rep-n, Welleck et al. 2020, arXiv 1908.04319)."""
    if not len(ngrams.values):
        return math.nan
    different = np.unique(ngrams.values * len(ngrams.lengths) + ngrams.owners)
    return 1 - len(different) / len(ngrams.values)


def length_distance(a: Ints, b: Ints) -> float:
    """Wasserstein-1 distance of two samples of lengths, in words: how many a line must gain or lose on average."""
    longest = int(max(a.max(), b.max())) + 1
    below = [np.cumsum(np.bincount(lengths, minlength=longest)) / len(lengths) for lengths in (a, b)]
    return float(np.abs(below[0] - below[1]).sum())


def self_bleu(ngrams: Sequence[Rows]) -> float:
    """Mean over lines of the BLEU of a line with all others as references (Zhu et al. 2018, arXiv 1802.01886), 0..1.

    BLEU-4 of a sentence (Papineni et al. 2002): bp * (prod_k matched_k / total_k)^(1/K), with K = the longest n-grams
    that the line has, at most 4, and the i-th zero among the matches replaced by 2^-i (mteval's smoothing).

    Args:
        ngrams: the 1-grams, 2-grams, ... of the same lines.
    """
    n, lengths = len(ngrams[0].lengths), ngrams[0].lengths
    if n < 2:
        return math.nan
    log_sum, orders, halvings = np.zeros(n), np.zeros(n), np.zeros(n)
    any_match = np.zeros(n, dtype=bool)
    for rows in ngrams:
        matched, total = matches_elsewhere(rows), rows.lengths
        has, hit = total > 0, matched > 0
        halvings += has & ~hit
        numerator = np.where(hit, matched, 0.5**halvings)
        log_sum += np.where(has, np.log(numerator / np.maximum(total, 1)), 0.0)
        orders += has
        any_match |= hit
    penalty = np.minimum(0.0, 1 - closest_other(lengths) / np.maximum(lengths, 1))
    return float(np.where(any_match, np.exp(penalty + log_sum / np.maximum(orders, 1)), 0.0).mean())


def matches_elsewhere(rows: Rows) -> Ints:
    """Of each line, how many of its n-grams another line has, each as often as the one that has it most, (n,)."""
    # Count each (n-gram, line); sort so that of each n-gram the highest count comes first, then the second highest.
    pairs, counts = np.unique(rows.values * len(rows.lengths) + rows.owners, return_counts=True)
    grams, lines = np.divmod(pairs, len(rows.lengths))
    order = np.lexsort((-counts, grams))
    grams, lines, counts = grams[order], lines[order], counts[order]
    first = np.flatnonzero(np.diff(grams, prepend=-1))
    second = first + 1
    has_second = (second < len(grams)) & (grams[np.minimum(second, len(grams) - 1)] == grams[first])
    runner_up = np.where(has_second, counts[np.minimum(second, len(grams) - 1)], 0)
    sizes = np.diff(np.append(first, len(grams)))
    most_elsewhere = np.repeat(counts[first], sizes)
    most_elsewhere[first] = runner_up
    clipped = np.minimum(counts, most_elsewhere)
    return np.bincount(lines, clipped, len(rows.lengths)).astype(np.int64)


def closest_other(lengths: Ints) -> Ints:
    """Of each line, the length of another line that is closest to its own, the shorter of two, (n,)."""
    kinds, counts = np.unique(lengths, return_counts=True)
    gaps = np.abs(kinds[:, None] - kinds[None, :])
    gaps[np.diag_indices(len(kinds))] = np.where(counts > 1, 0, np.iinfo(np.int64).max)
    closest: Ints = kinds[gaps.argmin(axis=1)]
    return closest[np.searchsorted(kinds, lengths)]


# Embeddings


def distances(a: Floats, b: Floats) -> Floats:
    """Euclidean distances of rows (n, D), (m, D) -> (n, m)."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def energy_distance(aa: Floats, ab: Floats, bb: Floats) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, unbiased, so that it may be below 0 (Szekely, Rizzo 2013).

    Args:
        aa: distances within a, (n, n), the diagonal of zeros left out of the mean.
        ab: from a to b, (n, m).
        bb: within b, (m, m).
    """
    n, m = ab.shape
    return float(2 * ab.mean() - aa.sum() / (n * (n - 1)) - bb.sum() / (m * (m - 1)))


def mauve(p: Counts, q: Counts, scale: float = 5.0) -> float:
    """Area under the divergence frontier of two histograms over the same clusters, 0..1 (Pillutla et al. 2021).

    arXiv 2102.01454, section 2: the curve of (exp(-c KL(q || r)), exp(-c KL(p || r))), r = lambda p + (1 - lambda) q,
    KL in nats, 0 < lambda < 1, with the corners (1, 0) and (0, 1); c is `scale`.
    """
    p, q = np.asarray(p, float), np.asarray(q, float)
    p, q = p / p.sum(), q / q.sum()
    points = [(0.0, 1.0)]
    for weight in np.linspace(1e-6, 1 - 1e-6, 100):
        r = weight * p + (1 - weight) * q
        points.append((2 ** (-scale * kl_bits(q, r)), 2 ** (-scale * kl_bits(p, r))))
    points.append((1.0, 0.0))
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def k_means(x: Floats, k: int, rng: np.random.Generator, rounds: int = 30) -> Floats:
    """Lloyd's algorithm from k-means++ seeds: the centres (k, D) of rows (n, D), fewer if fewer rows differ."""
    centres: Floats = x[rng.integers(len(x))][None]
    nearest = distances(x, centres)[:, 0]
    while len(centres) < k and nearest.max() > 1e-6:
        centres = np.vstack([centres, x[rng.choice(len(x), p=nearest**2 / (nearest**2).sum())]])
        nearest = np.minimum(nearest, distances(x, centres[-1:])[:, 0])
    labels = distances(x, centres).argmin(axis=1)
    for _ in range(rounds):
        members = np.equal.outer(np.arange(len(centres)), labels).astype(float)  # (k, n)
        sizes = members.sum(axis=1, keepdims=True)
        centres = np.where(sizes > 0, members @ x / np.maximum(sizes, 1), centres)
        moved = distances(x, centres).argmin(axis=1)
        if (moved == labels).all():
            break
        labels = moved
    return centres
