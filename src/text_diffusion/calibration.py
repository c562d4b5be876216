"""How sure the model is of a word at noise level t, against how often that word stays to the end.

Sentences are walked back from noise by ancestral sampling, which draws from p itself: if p were right, a word that has
probability c given x_t would be there at the end with probability c. (A sampler without noise decides at its start.)
Confidence is that of the tied head at the prediction of x_0, the largest of softmax(lm_head(xhat_0)). An xhat_0 that
minimises squared error is a mean of embeddings; nothing in its training makes the head's softmax of a mean the
probability of a word, so that a distance from the diagonal is to be expected, and is what is measured here. A model of
`cross_entropy` learns p(w | x_t) itself, and is asked for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.generation import TextDiffusion
from text_diffusion.samplers import Step

BINS = 10  # of confidence
QUARTERS = 4  # of t


@dataclass(frozen=True)
class Calibration:
    """Counts by quarter of t and bin of confidence, (QUARTERS, BINS), and sums of confidence over them."""

    counts: NDArray[np.int64]
    stays: NDArray[np.int64]
    confidence: NDArray[np.float64]

    def curve(self, quarter: int, fewest: int = 20) -> tuple[list[float], list[float]]:
        """Mean confidence and share that stays, of the bins that hold at least `fewest` words."""
        some = self.counts[quarter] >= fewest
        n = self.counts[quarter][some]
        return (self.confidence[quarter][some] / n).tolist(), (self.stays[quarter][some] / n).tolist()

    def error(self, quarter: int) -> float:
        """Expected calibration error: the mean over words of |confidence - share that stays| of their bin."""
        return float(np.abs(self.confidence[quarter] - self.stays[quarter]).sum() / max(self.counts[quarter].sum(), 1))


def probabilities(model: TextDiffusion, step: Step, previous: Tensor | None) -> Tensor:
    """What the model holds of every word at a step, (B, L, V); `previous` is the prediction of the step before."""
    if isinstance(model.model, WordDenoiser):
        time = model.diffusion.network_time(torch.full((len(step.x_t),), step.t, device=step.x_t.device))
        return model.model.log_probs(step.x_t, time, previous).exp()
    return model.model.get_logits(step.pred_xstart).float().softmax(dim=-1)


def calibrate(model: TextDiffusion, sentences: int = 256, steps: int = 50, seed: int = 10708) -> Calibration:
    """Walk sentences back and compare. Where the model expects no word, but [CLS], [SEP] or [PAD], nothing is counted.

    Raises:
        UserError: more steps than the model has.
    """
    timesteps, words, sure = [], [], []
    previous = None
    with torch.no_grad():
        for step in model.denoising(0, sentences, sampler="ancestral", spacing="uniform", steps=steps, seed=seed):
            most = probabilities(model, step, previous).max(dim=-1)  # each (B, L)
            previous = step.pred_xstart
            timesteps.append(step.t)
            words.append(most.indices.cpu().numpy())
            sure.append(most.values.cpu().double().numpy())
    shape = (QUARTERS, BINS)
    counts, stays, sums = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape)
    tokenizer, T = model.tokenizer, model.diffusion.num_timesteps
    for t, word, confidence in zip(timesteps[:-1], words[:-1], sure[:-1], strict=True):  # the last ones are what stays
        is_word = ~np.isin(word, (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id))
        place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)[is_word]
        quarter = t * QUARTERS // T
        counts[quarter] += np.bincount(place, minlength=BINS)
        stays[quarter] += np.bincount(place, (word == words[-1])[is_word], BINS).astype(np.int64)
        sums[quarter] += np.bincount(place, confidence[is_word], BINS)
    return Calibration(counts, stays, sums)
