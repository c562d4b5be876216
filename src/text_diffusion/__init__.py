"""Gaussian diffusion of text in the space of word embeddings (Diffusion-LM, Li et al. 2022, arXiv 2205.14217).

A sentence is embedded, noised by a known forward process q, and a transformer learns to predict the clean embeddings
back. Sampling runs that backwards from pure noise; the tied ``lm_head`` rounds the result to words.

Notation, the same letters in code, docstrings and docs::

    B, L, D, H, V, T              batch, sequence length, embedding size, hidden size, vocabulary size, diffusion steps
    w       input_ids             (B, L) int64    token ids, padded with the id of [PAD]
    E(w)    x_start_mean          (B, L, D)       embeddings of the tokens
    x_0     x_start               (B, L, D)       E(w) + sqrt(1 - abar_0) * noise
    x_t     x_t                   (B, L, D)       the noised sentence at step t, 0 <= t < T
    beta_t  betas                 (T,) float64    noise schedule
    abar_t  alphas_cumprod        (T,) float64    prod_{s <= t} (1 - beta_s): the signal that is left
    f       TransformerNetModel                   the denoiser: x_t, t -> prediction of x_0
    q, p    q_*, p_*                              the forward process, known; the reverse process, learned

Reading order: ``schedules``, ``gaussian_diffusion``, ``losses``, ``modeling``, ``samplers``, ``step``, ``train``; then
``cross_entropy``, the default objective, with ``fitted_time``, ``shared_evidence`` and ``neighbours``,
``distillation``, its students, and ``modern``, the second kind of layers. The rest is plumbing: ``config`` (every
setting and its default), ``flags``, ``tokenizer``, ``corpus`` and ``data`` (text to batches), ``randomness``,
``timesteps``, ``loss_by_timestep``, ``muon``, ``ema``; ``run``, ``resuming``, ``state``, ``checkpoint``, ``meter``,
``validation``, ``embedding_health`` and ``tracking`` (a training run); ``spacing``, ``sampling``, ``generation``,
``sample``, ``display`` and ``quick`` (sampling); ``control`` (steering it); ``grammar`` (a language known exactly),
``ngrams``, ``embedding``, ``metrics``, ``figures`` and ``evaluate`` (how good samples are); ``bound``, ``flow`` and
``likelihood`` (how probable a sentence is); ``objectives``, ``masked`` and ``autoregressive`` (what else may be
learned), ``teacher`` (who judges) and ``calibration`` (sure and right?); ``report`` and ``visual`` (pages about runs);
``launcher``, ``distributed``, ``parallel`` and ``route`` (many ranks, one run); ``snapshot``, ``saver``, ``lock``,
``remote``, ``mirror`` and ``uploads`` (its files); ``condition``, ``encoding`` and ``pairs`` (labels and sources);
``chunked`` (large vocabularies); ``deterministic``; ``device``; ``original``, ``pretrained``, ``bert_folder`` and
``hub`` (weights of other programs), ``files``, ``visible``, ``memory`` and ``errors``.

>>> import text_diffusion
>>> sentences = text_diffusion.load("ckpts/simple/ema_0.9999_025000.pt").sample(4, steps=20)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from text_diffusion.generation import Writer

__version__ = "0.1.0"


def load(path: str, *, device: str = "auto", tokenizer: str = "") -> Writer:
    """Load a weights file; see :func:`text_diffusion.generation.load`."""
    from text_diffusion import generation  # here, so that `import text_diffusion` does not wait for torch

    return generation.load(path, device=device, tokenizer=tokenizer)
