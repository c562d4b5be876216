"""The flow: exact traces, a density known in closed form, and a language whose probabilities sum to one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from micro import D, L, Micro, train_micro
from torch import Tensor

from text_diffusion.bound import handover_for, log_decoder
from text_diffusion.flow import (
    Predict,
    Trace,
    exact_trace,
    flow,
    hutchinson_trace,
    no_trace,
    ode_log_density,
    ode_log_weight,
    predict_twice,
)
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.schedules import named_betas

Normal: Any = torch.distributions.Normal  # its methods have no types

# Traces


def curved(x: Tensor) -> Tensor:
    """A function of each sentence whose Jacobian is full and not symmetric."""
    weights = torch.linspace(-1, 2, 36).view(6, 6)
    return (x.flatten(1) @ weights).sin().view_as(x) * x.sum(dim=(1, 2), keepdim=True)


def jacobian_trace(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An independent way: the whole Jacobian of one sentence after the other."""
    n = x[0].numel()
    jacobians = (torch.func.jacrev(f)(row[None]).reshape(n, n) for row in x)
    return torch.stack([jacobian.trace() for jacobian in jacobians])


def test_exact_trace_is_that_of_the_jacobian() -> None:
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    y, trace = exact_trace(curved, x)
    torch.testing.assert_close(y, curved(x))
    torch.testing.assert_close(trace, jacobian_trace(curved, x))
    assert not y.requires_grad
    assert not trace.requires_grad


def test_hutchinson_over_all_probes_is_the_exact_trace() -> None:
    """The mean over all 2^6 vectors of +-1 is an identity, not an estimate."""
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    probes = torch.tensor(list(product((-1.0, 1.0), repeat=6))).view(64, 1, 2, 3).expand(64, 4, 2, 3)
    y, trace = hutchinson_trace(probes, curved, x)
    torch.testing.assert_close(y, curved(x))
    torch.testing.assert_close(trace, jacobian_trace(curved, x))


# Gaussian data, whose flow is known

MU, STD = 1.5, 0.5


def gaussian_predict(process: GaussianDiffusion) -> Predict:
    """E[x_start | x_t] for x_start ~ N(MU, STD^2), t anywhere."""
    phis = np.arccos(np.sqrt(process.alphas_cumprod))

    def predict(x: Tensor, t: float) -> Tensor:
        abar = math.cos(float(np.interp(t, range(process.num_timesteps), phis))) ** 2
        b = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)
        return MU - b * math.sqrt(abar) * MU + b * x

    return predict


def exact_log_density(process: GaussianDiffusion, x: Tensor, s: int) -> Tensor:
    abar = float(process.alphas_cumprod[s])
    law = Normal(math.sqrt(abar) * MU, math.sqrt(abar * STD**2 + 1 - abar))
    log_p: Tensor = law.log_prob(x)
    return log_p.sum(dim=(1, 2))


@pytest.mark.parametrize("s", [0, 150])
@pytest.mark.parametrize("trace", [exact_trace, partial(hutchinson_trace, torch.ones(1, 5, 2, 3))])
def test_density_of_gaussian_data_is_the_closed_form(trace: Trace, s: int) -> None:
    """With a linear and diagonal denoiser Hutchinson's trace is exact too."""
    process = GaussianDiffusion(named_betas("sqrt", 2000))
    x = MU + torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1))
    found = ode_log_density(gaussian_predict(process), process, x, 24, trace, s)
    torch.testing.assert_close(found, exact_log_density(process, x, s), atol=0.01, rtol=0)  # abar_{T-1} > 0


def test_flow_keeps_quantiles_and_returns() -> None:
    """In one dimension the flow takes each quantile to the same quantile; back again is where it began."""
    process = GaussianDiffusion(named_betas("sqrt", 2000))
    x = torch.linspace(-2, 3, 6)[:, None, None]
    there, _ = flow(gaussian_predict(process), process, x, 0, 1999, 40, no_trace)
    abar = float(process.alphas_cumprod[0])
    torch.testing.assert_close(
        there, (x - math.sqrt(abar) * MU) / math.sqrt(abar * STD**2 + 1 - abar), atol=2e-3, rtol=0
    )
    back, _ = flow(gaussian_predict(process), process, there, 1999, 0, 40, no_trace)
    torch.testing.assert_close(back, x, atol=1e-3, rtol=0)


def test_error_falls_with_the_fourth_power_of_the_steps() -> None:
    process = GaussianDiffusion(named_betas("cosine", 2000))
    x = torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    density = [ode_log_density(gaussian_predict(process), process, x, n, exact_trace, 200) for n in (8, 16, 320)]
    ratio = float((density[0] - density[2]).abs() / (density[1] - density[2]).abs())
    assert 10 < ratio < 30


# The micro-language


def detached(micro: Micro) -> Predict:
    """The same estimates with the self-conditioning path left out of the derivative."""

    def predict(x: Tensor, t: float) -> Tensor:
        time = torch.full((len(x),), t * micro.diffusion.time_scale)
        xhat: Tensor = micro.model(x, time, micro.model(x, time).detach())
        return xhat

    return predict


def log_weights(micro: Micro, predict: Predict, draws: int, steps: int = 8, handover: int = 60) -> Tensor:
    """log p(w | x_0) p_ODE / q of every sentence, (draws, 1296), the same draws for every `predict`."""
    decoder = partial(log_decoder, micro.model, micro.sentences)
    posterior, E = micro.posterior(micro.diffusion), micro.x_start_mean
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(E.shape, generator=generator) for _ in range(draws)]
    return torch.stack(
        [
            ode_log_weight(predict, decoder, micro.diffusion, posterior, E, z, steps, exact_trace, handover)
            for z in noises
        ]
    )


def total(log_weights: Tensor) -> tuple[float, float]:
    """The sum over all sentences of their mean weights, and its error."""
    weights = log_weights.exp()
    return float(weights.mean(dim=0).sum()), float((weights.var(dim=0).sum() / len(weights)).sqrt())


def test_micro_language_sums_to_one_with_the_whole_trace_only(micro: Micro) -> None:
    """Within five errors; `test_micro_language_sums_to_one_closely` takes longer."""
    weights = log_weights(micro, predict_twice(micro.model, micro.diffusion), 2)
    found, error = total(weights)
    assert error < 0.04
    assert found == pytest.approx(1.0, abs=5 * error)

    without = log_weights(micro, detached(micro), 1)[0]
    assert float((without - weights[0]).abs().mean()) > 0.1  # nats a sentence


@pytest.mark.slow
def test_micro_language_sums_to_one_closely(micro: Micro) -> None:
    found, error = total(log_weights(micro, predict_twice(micro.model, micro.diffusion), 24, 16))
    wrong, wrong_error = total(log_weights(micro, detached(micro), 8, 16))
    print(f"whole trace {found:.4f} ± {error:.4f}, self-conditioning path left out {wrong:.4f} ± {wrong_error:.4f}")
    assert error < 0.01
    assert found == pytest.approx(1.0, abs=0.02)
    assert abs(wrong - 1) > 0.05


@pytest.mark.slow
def test_micro_language_sums_to_one_by_cross_entropy_too() -> None:
    """Words are decided within a short part of the way there, which takes more steps."""
    micro = train_micro(words=True)
    handover = handover_for(micro.posterior(micro.diffusion), micro.model.embeddings, micro.sentences)
    found, error = total(log_weights(micro, predict_twice(micro.model, micro.diffusion), 4, 32, handover))
    print(f"whole trace {found:.4f} ± {error:.4f}")
    assert error < 0.01
    assert found == pytest.approx(1.0, abs=0.02)


def test_self_conditioning_belongs_to_the_trace(micro: Micro) -> None:
    """At one noise level, against finite differences, which differentiate all there is."""
    noise = torch.randn(13, L, D, generator=torch.Generator().manual_seed(0))
    x = micro.posterior(micro.diffusion).marginal(micro.x_start_mean[::100], 300).sample(noise)
    predict = predict_twice(micro.model, micro.diffusion)
    _, whole = exact_trace(lambda x: predict(x, 300.0), x)
    _, partly = exact_trace(lambda x: detached(micro)(x, 300.0), x)
    steps = torch.eye(L * D).view(-1, 1, L, D) * 5e-3
    differences = torch.stack([(predict(x + h, 300.0) - predict(x - h, 300.0)) / 1e-2 for h in steps])  # (n, B, L, D)
    numeric = differences.flatten(2).diagonal(dim1=0, dim2=2).sum(dim=1)
    torch.testing.assert_close(whole, numeric, atol=0.05, rtol=0.02)
    assert float((partly - numeric).abs().mean()) > 5 * float((whole - numeric).abs().mean())


def test_self_conditioned_model_is_asked_twice(micro: Micro) -> None:
    calls: list[int] = []
    predict = predict_twice(micro.model, micro.diffusion)
    handle = micro.model.register_forward_hook(lambda *_: calls.append(1))
    predict(torch.zeros(1, L, D), 3.5)
    handle.remove()
    assert len(calls) == 2
