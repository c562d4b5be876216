"""Calibration: counted by hand from the walk itself, and what its figures say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from text_diffusion.calibration import BINS, QUARTERS, Calibration, calibrate
from text_diffusion.generation import load_diffusion


@torch.no_grad()
def test_counts_are_those_of_the_walk(writer: Path) -> None:
    """An independent way: word by word, in plain Python."""
    model = load_diffusion(writer)
    found = calibrate(model, 6, 10, seed=3)
    counts, stays = np.zeros((QUARTERS, BINS), int), np.zeros((QUARTERS, BINS), int)
    steps = list(model.denoising(0, 6, sampler="ancestral", spacing="uniform", steps=10, seed=3))
    p = [model.model.get_logits(step.pred_xstart).softmax(-1) for step in steps]
    special = {model.tokenizer.cls_id, model.tokenizer.sep_id, model.tokenizer.pad_id}
    for step, probabilities in zip(steps[:-1], p[:-1], strict=True):  # the last says what stays
        for b in range(6):
            for place in range(probabilities.shape[1]):
                word = int(probabilities[b, place].argmax())
                if word not in special:
                    at = int(step.t / 20 * 4), min(int(float(probabilities[b, place, word]) * 10), 9)
                    counts[at] += 1
                    stays[at] += word == int(p[-1][b, place].argmax())
    assert counts.sum() > 100
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_array_equal(found.stays, stays)
    assert 0 < found.stays.sum() < found.counts.sum()


def test_error_and_curve_of_known_counts() -> None:
    counts, stays, sums = (np.zeros((QUARTERS, BINS)) for _ in range(3))
    counts[1, [2, 9]], stays[1, [2, 9]], sums[1, [2, 9]] = (100, 300), (50, 300), (25.0, 285.0)
    found = Calibration(counts.astype(np.int64), stays.astype(np.int64), sums)
    assert found.curve(1) == ([0.25, 0.95], [0.5, 1.0])
    assert found.error(1) == pytest.approx((25 + 15) / 400)
    assert found.curve(0) == ([], [])
    assert found.error(0) == 0
    assert found.curve(1, fewest=200) == ([0.95], [1.0])
