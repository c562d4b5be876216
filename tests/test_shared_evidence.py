"""Evidence from elsewhere in a sentence: term by term, and against Bayes' rule where it is exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch

from text_diffusion.config import ModelConfig
from text_diffusion.cross_entropy import MOST_SHARED, WordDenoiser, evidence
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.schedules import named_betas
from text_diffusion.shared_evidence import WIDTH, SharedEvidence

B, L, H, D, V, A = 3, 5, 8, 4, 6, 2


@torch.no_grad()
def test_term_by_term() -> None:
    torch.manual_seed(0)
    layer = SharedEvidence(H, A)
    layer.gate.copy_(torch.tensor([0.7, -0.4]))
    h, e = torch.randn(B, L, H), torch.randn(B, L, D)
    qk = layer.qk(h).view(B, L, 2, A, WIDTH).double().numpy()
    expected = np.zeros((B, L, D))
    for b, i, head in np.ndindex(B, L, A):
        others = [j for j in range(L) if j != i]
        scores = [qk[b, i, 0, head] @ qk[b, j, 1, head] / math.sqrt(WIDTH) for j in others]
        for j, weight in zip(others, scipy.special.softmax(scores), strict=True):
            expected[b, i] += layer.gate[head].item() * weight * e[b, j].numpy()
    assert layer(h, e).numpy() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_word_that_returns_is_exact() -> None:
    """Two positions that have the same word, of prior softmax(b): with f = 0 it is Bayes' rule for both embeddings."""
    torch.manual_seed(0)
    config = ModelConfig(
        objective="cross_entropy", in_channel=D, hidden_size=H, num_layers=1, num_heads=A, num_channels=4
    )
    model = WordDenoiser(config, V, 3).eval()
    for parameter in model.output_down_proj.parameters():
        parameter.zero_()
    model.lm_head.bias.copy_(torch.randn(V))
    model.shared_evidence.gate.fill_(1 / A)
    process = GaussianDiffusion(named_betas("log-snr", 100), torch.device("cpu"))
    word = torch.arange(V).repeat(20)  # of 120 sentences
    t = torch.arange(len(word)) % 20 + 55  # lambda below -4: alpha / sigma^2 is below its bound
    E = model.embeddings
    x_t = process.q_sample(E[word][:, None].expand(-1, 2, -1), t[:, None].expand(-1, 2), torch.randn(len(word), 2, D))
    abar = process.alphas_cumprod[t.numpy()][:, None]
    assert (np.sqrt(abar) / (1 - abar)).max() < MOST_SHARED
    squares = ((x_t[:, :, None] - torch.tensor(abar).sqrt().float()[:, :, None, None] * E) ** 2).sum(-1)  # (120, 2, V)
    log_likelihood = (-squares.double().numpy() / (2 * (1 - abar[:, :, None]))).sum(axis=1)
    expected = scipy.special.log_softmax(model.lm_head.bias.double().numpy() + log_likelihood, axis=-1)
    found = model.log_probs(x_t, process.network_time(t))
    for place in (0, 1):
        assert found[:, place].numpy() == pytest.approx(expected, abs=1e-4)


def test_a_clear_word_is_bounded() -> None:
    x = torch.randn(2, 3, D)
    assert torch.equal(evidence(x, torch.zeros(2), most=MOST_SHARED), MOST_SHARED * x)
    noisy = torch.full((2,), 900.0)
    assert torch.equal(evidence(x, noisy, most=MOST_SHARED), evidence(x, noisy))
