"""The bound of the walk: its terms in closed form, its limit with a perfect denoiser, and brute force on a language."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from micro import D, L, Micro
from torch import Tensor
from torch.distributions import kl_divergence

from text_diffusion import samplers
from text_diffusion.bound import (
    Drawn,
    PathTerms,
    Posterior,
    handover_for,
    kl,
    log_decoder,
    log_mean,
    log_ratio,
    path_terms,
    walk,
)
from text_diffusion.gaussian_diffusion import Gaussian, GaussianDiffusion
from text_diffusion.samplers import Denoise
from text_diffusion.schedules import named_betas
from text_diffusion.spacing import spaced_timesteps

Normal: Any = torch.distributions.Normal  # its methods have no types


def process(steps: int, kept: int | None = None) -> GaussianDiffusion:
    diffusion = GaussianDiffusion(named_betas("sqrt", steps))
    return diffusion if kept is None else diffusion.respace(spaced_timesteps(diffusion.alphas_cumprod, kept))


def normal_noise(shape: tuple[int, ...], seed: int = 0) -> samplers.NoiseSource:
    generator = torch.Generator().manual_seed(seed)
    return lambda s: torch.randn(shape, generator=generator)


def test_kl_and_log_ratio_are_those_of_torch() -> None:
    torch.manual_seed(0)
    q, p = (Gaussian(torch.randn(3, 2, 4), torch.rand(1, 1, 1) + 0.5) for _ in range(2))
    x = torch.randn(3, 2, 4)
    theirs_q, theirs_p = Normal(q.mean, q.variance.sqrt()), Normal(p.mean, p.variance.sqrt())
    torch.testing.assert_close(kl(q, p), kl_divergence(theirs_q, theirs_p).sum(dim=(1, 2)))
    torch.testing.assert_close(log_ratio(p, q, x), (theirs_p.log_prob(x) - theirs_q.log_prob(x)).sum(dim=(1, 2)))


def test_kl_of_nearly_equal_variances_keeps_its_digits() -> None:
    zero = torch.zeros(1, 100, 100)
    q, p = Gaussian(zero, torch.full((1, 1, 1), 1.0)), Gaussian(zero, torch.full((1, 1, 1), 1.001))
    assert float(kl(q, p)) == pytest.approx(0.5 * 1e4 * (1 / 1.001 - 1 + math.log(1.001)), rel=2e-3)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{s-1} | x_s, w) q(x_s | w) = q(x_s | x_{s-1}) q(x_{s-1} | w), the noise of w -> x_start included."""
    diffusion, v = process(50, 7), 0.3
    posterior, E = Posterior(diffusion, v), torch.full((1, 1, 1), 1.7)
    x_s, before = torch.tensor([[[0.4]]]), torch.tensor([[[-0.9]]])

    def log_p(gaussian: Gaussian, x: Tensor) -> float:
        return float(Normal(gaussian.mean, gaussian.variance.sqrt()).log_prob(x))

    for s in range(1, 7):
        beta = float(diffusion.betas[s])
        onward = Gaussian(math.sqrt(1 - beta) * before, torch.full((1, 1, 1), beta))
        left = log_p(posterior.step(E, x_s, s), before) + log_p(posterior.marginal(E, s), x_s)
        right = log_p(onward, x_s) + log_p(posterior.marginal(E, s - 1), before)
        assert left == pytest.approx(right, abs=1e-4)
    start = diffusion.alphas_cumprod[0]
    assert posterior.v[0] == pytest.approx(1 - start + start * v)  # sqrt(abar) x_start + sqrt(1 - abar) noise


# Gaussian data: x_start ~ N(MU, STD^2), "said" by a decoder that is its posterior

MU, STD = 1.5, 0.5


def regression(abar: float) -> tuple[float, float, float]:
    """E[x_start | x_t] = a + b x_t, and its variance: (a, b, variance)."""
    b = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)
    return MU - b * math.sqrt(abar) * MU, b, STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)


def test_terms_of_gaussian_data_are_the_closed_forms() -> None:
    """Each KL, the prior, the decoder and -log P, of the walk with the exact denoiser; a false alarm once in 10^5."""
    S, N, z = 12, 40_000, 2.1
    diffusion = process(400, S)
    abar = diffusion.alphas_cumprod.tolist()
    lines = [regression(a) for a in abar]

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        a, b, _ = lines[int(t[0])]
        return a + b * x_t

    def decoder(xhat: Tensor) -> Tensor:
        log_p: Tensor = Normal(xhat, math.sqrt(lines[0][2])).log_prob(torch.tensor(z))
        return log_p.flatten()

    E = torch.full((N, 1, 1), z)
    terms = path_terms(walk(denoise, diffusion, Posterior(diffusion, 0.0), E, normal_noise((N, 1, 1))), decoder)

    expected = []
    for s in range(1, S):  # (mu_q - mu_p) = coefficient of x_start times (z - xhat_s), and equal variances
        a, b, _ = lines[s]
        variance = diffusion.betas[s] * (1 - abar[s - 1]) / (1 - abar[s])
        coefficient = diffusion.betas[s] * math.sqrt(abar[s - 1]) / (1 - abar[s])
        miss = (z - a - b * math.sqrt(abar[s]) * z) ** 2 + b**2 * (1 - abar[s])
        expected.append(coefficient**2 * miss / (2 * variance))
    last = abar[-1]
    expected.append(0.5 * (last * z**2 - last - math.log1p(-last)))
    errors = terms.kl.std(dim=0) / math.sqrt(N)
    assert ((terms.kl.mean(dim=0) - torch.tensor(expected)).abs() <= 5 * errors + 1e-5).all()

    mean, variance = 0.0, 1.0  # of x_s under p, from noise to x_0
    for s in reversed(range(1, S)):
        a, b, _ = lines[s]
        from_start = diffusion.betas[s] * math.sqrt(abar[s - 1]) / (1 - abar[s])
        from_x = (1 - abar[s - 1]) * math.sqrt(abar[s] / abar[s - 1]) / (1 - abar[s])
        mean, slope = from_start * a + (from_start * b + from_x) * mean, from_start * b + from_x
        variance = slope**2 * variance + diffusion.betas[s] * (1 - abar[s - 1]) / (1 - abar[s])
    a, b, rest = lines[0]
    log_P = float(Normal(a + b * mean, math.sqrt(b**2 * variance + rest)).log_prob(torch.tensor(z)))

    weights = terms.log_weight
    bound, error = -float(weights.mean()), float(weights.std()) / math.sqrt(N)
    terms_sum = float((terms.reconstruction + terms.kl.sum(dim=1)).mean())
    assert terms_sum == pytest.approx(bound, abs=5 * error + 5 * float(terms.kl.sum(dim=1).std()) / math.sqrt(N))
    assert bound > -log_P + 5 * error, "the posterior's variance is too small for few steps, so there is a gap"
    relative = weights.sub(weights.max()).exp()
    tightened = float(log_mean(weights[:, None]))
    assert tightened == pytest.approx(log_P, abs=5 * float(relative.std() / relative.mean()) / math.sqrt(N))


# A language of one word, and its perfect denoiser


class Mixture:
    """E[x_start | x_s] for words of probabilities p at E(w), spread by the variance v; exact, by Bayes' rule."""

    def __init__(self, diffusion: GaussianDiffusion, embeddings: Tensor, p: Tensor, v: float) -> None:
        self.posterior, self.embeddings, self.log_p, self.v = Posterior(diffusion, v), embeddings, p.log(), v

    def words(self, x: Tensor, s: int) -> Tensor:
        """log p(w | x_s), (B, 1, V)."""
        abar, v = float(self.posterior.abar[s]), float(self.posterior.v[s])
        distances = (x[:, :, None] - math.sqrt(abar) * self.embeddings).square().sum(dim=-1)
        return (self.log_p - distances / (2 * v)).log_softmax(dim=-1)

    def __call__(self, x: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        s = int(t[0])
        abar, v = float(self.posterior.abar[s]), float(self.posterior.v[s])
        mean = self.words(x, s).exp() @ self.embeddings
        shrink = math.sqrt(abar) * self.v / v  # E[x_start | x_s, w] = E(w) + shrink (x_s - sqrt(abar) E(w))
        return mean + shrink * (x - math.sqrt(abar) * mean)


def bound_of_a_mixture(S: int, p: Tensor, v: float, paths: int = 1000) -> tuple[Tensor, Tensor]:
    """The bounds of all words with the perfect denoiser in S steps, in nats, and their errors, both (V,)."""
    V = len(p)
    angles = torch.arange(V) * (2 * torch.pi / V)
    embeddings = 4 * torch.stack([angles.cos(), angles.sin()], dim=1)
    diffusion = process(2000, S)
    ids = torch.arange(V).repeat_interleave(paths)[:, None]
    denoise = Mixture(diffusion, embeddings, p, v)
    kept: list[Tensor] = []

    def decoder(xhat: Tensor) -> Tensor:
        return denoise.words(kept[0], 0).gather(2, ids[:, :, None]).flatten()

    def remembering(x: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        kept[:] = [x]
        return denoise(x, t, previous)

    noise = normal_noise((len(ids), 1, 2))
    drawn = walk(remembering, diffusion, denoise.posterior, embeddings[ids], noise)
    bounds = -path_terms(drawn, decoder).log_weight.view(V, paths)
    return bounds.mean(dim=1), bounds.std(dim=1) / math.sqrt(paths)


@pytest.mark.parametrize(("v", "left"), [(0.0, 0.02), (0.0146, 0.15)])
def test_with_a_perfect_denoiser_the_bound_tends_to_the_truth(v: float, left: float) -> None:
    """-log p(w) from above, a gap that shrinks with the steps; with v it does so late, as sigma_s^2 knows nothing of v.

    A false alarm once in 10^5.
    """
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    gaps = []
    for S in (25, 100, 400):
        bounds, errors = bound_of_a_mixture(S, p, v)
        assert (bounds >= -p.log() - 5 * errors).all()
        gaps.append(float((bounds + p.log()) @ p))
    assert gaps[0] > gaps[1] > gaps[2]
    assert abs(gaps[2]) < left


# The micro-language


def enumerated(micro: Micro, S: int, paths: int, handover: int) -> Tensor:
    """log p(w, path) / q(path | w) of every sentence, (paths, 1296)."""
    diffusion = micro.diffusion.respace(spaced_timesteps(micro.diffusion.alphas_cumprod, S))
    denoise, N = denoiser(micro, diffusion), len(micro.sentences)
    decoder = partial(log_decoder, micro.model, micro.sentences)

    def one(path: int) -> PathTerms:
        noise = normal_noise((N, L, D), path)
        return path_terms(
            walk(denoise, diffusion, micro.posterior(diffusion), micro.x_start_mean, noise, handover), decoder
        )

    return torch.stack([one(path).log_weight for path in range(paths)])


def denoiser(micro: Micro, diffusion: GaussianDiffusion) -> Denoise:
    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        xhat: Tensor = micro.model(x_t, diffusion.network_time(t), previous)
        return xhat

    return denoise


@torch.no_grad()
def sampled(micro: Micro, S: int, N: int) -> tuple[Tensor, Tensor]:
    """P(w) of every sentence and its error, by running the sampler N times and drawing from the decoder, exactly."""
    diffusion = micro.diffusion.respace(spaced_timesteps(micro.diffusion.alphas_cumprod, S))
    *_, last = samplers.ancestral(denoiser(micro, diffusion), diffusion, normal_noise((N, L, D)))
    words = micro.model.get_logits(last.pred_xstart).softmax(dim=-1)  # (N, L, V)
    p = words[:, 0]
    for position in range(1, L):
        p = (p[:, :, None] * words[:, None, position]).flatten(1)
    return p.mean(dim=0), p.std(dim=0) / math.sqrt(N)


def test_micro_language_bound_against_brute_force(micro: Micro) -> None:
    """For each of the 1,296 sentences the bound holds, for the process that `samplers.ancestral` runs, whatever q."""
    S, paths, N = 30, 16, 60_000
    diffusion = micro.diffusion.respace(spaced_timesteps(micro.diffusion.alphas_cumprod, S))
    best = handover_for(micro.posterior(diffusion), micro.model.word_embedding.weight, micro.sentences)
    P, P_error = sampled(micro, S, N)
    assert float(P.sum()) == pytest.approx(1.0, abs=1e-4)
    common = P > 2e-4
    assert int(common.sum()) > 1000
    sums = []
    for handover in (0, best):
        log_weights = enumerated(micro, S, paths, handover)
        bound, error = -log_weights.mean(dim=0), log_weights.std(dim=0) / math.sqrt(paths)
        above = (bound + P.log())[common] / (error.square() + (P_error / P).square()).sqrt()[common]
        assert float(above.min()) > -2.5  # with the better handover, a bound that is 1 bit less is found out
        sums.append(float((-bound).exp().sum()))

        weights = log_weights.exp()  # averaged, the same weights are P(w) itself
        total, total_error = float(weights.mean(dim=0).sum()), float((weights.var(dim=0).sum() / paths).sqrt())
        assert total_error < 0.2
        assert total == pytest.approx(1.0, abs=5 * total_error)
        assert float(log_mean(log_weights).exp().sum()) == pytest.approx(total, rel=1e-4)
        assert (-log_mean(log_weights) <= bound + 1e-4).all()  # tighter
    assert best > 0
    assert 0.1 < sums[0] < sums[1] <= 1.0
    assert sums[1] > 0.35  # not so loose that it would say nothing


def test_handover_for_is_the_last_step_that_tells_words_apart() -> None:
    diffusion = process(2000)
    posterior, ids = Posterior(diffusion, 0.0), torch.tensor([[0, 1, 0]])
    close, far = (handover_for(posterior, gap * torch.eye(2), ids) for gap in (1.0, 4.0))
    assert 0 < close < far < 1999
    distance, s = 4 * math.sqrt(2), far
    for step, below in ((s, True), (s + 1, False)):
        half = distance / 2 * math.sqrt(posterior.abar[step] / posterior.v[step])
        misread = 3 * 0.5 * math.erfc(half / math.sqrt(2))
        assert (misread <= 3e-4) is below
    assert handover_for(posterior, 0.01 * torch.eye(2), ids) == 0
    assert handover_for(Posterior(process(2000, 1), 0.0), torch.eye(2), ids) == 0


def test_a_walk_of_one_step_is_prior_and_decoder() -> None:
    diffusion = process(2000, 1)
    E = torch.ones(3, 2, 4)
    drawn: list[Drawn] = list(walk(lambda x, t, p: x, diffusion, Posterior(diffusion, 0.1), E, normal_noise((3, 2, 4))))
    assert [step.s for step in drawn] == [0]
    terms = path_terms(iter(drawn), lambda xhat: -xhat.new_ones(3))
    assert terms.kl.shape == (3, 1)
    assert terms.reconstruction.tolist() == [1, 1, 1]


def test_self_conditioning_is_carried_along_the_walk(micro: Micro) -> None:
    """Each call is given the prediction of the call before, as by the sampler."""
    seen: list[Tensor | None] = []
    given: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        seen.append(previous)
        given.append(micro.model(x_t, micro.diffusion.network_time(t), previous))
        return given[-1]

    diffusion = micro.diffusion.respace(spaced_timesteps(micro.diffusion.alphas_cumprod, 5))
    E = micro.x_start_mean[:2]
    path_terms(walk(denoise, diffusion, micro.posterior(diffusion), E, normal_noise((2, L, D))), lambda x: x[:, 0, 0])
    assert seen[0] is None
    assert all(before is previous for before, previous in zip(given, seen[1:], strict=False))
    assert len(given) == 5
