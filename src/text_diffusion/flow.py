"""How many bits a sentence needs if words come from the probability-flow ODE: a density for x_0, and from it P(w).

The process (Song et al. 2021, arXiv 2011.13456, eq. 13) goes from x_{T-1} ~ N(0, I) to x_0 without further noise, and
the decoder of `bound` (1) then draws the words. In the angle phi with cos phi = sqrt(abar), which is taken as linear
between two steps of training, the point x = cos(phi) x_start + sin(phi) noise moves (Salimans & Ho 2022,
arXiv 2202.00512, appendix D) by

    dx / dphi = (cos(phi) x - xhat(x, t)) / sin(phi)                                                           (1)
    log p_ODE(x_0) = log N(x_{T-1}; 0, I) + integral of (cos(phi) L D - tr dxhat/dx) / sin(phi) dphi           (2)
    P(w) = integral of p(w | x_0) p_ODE(x_0) = E_q [ p(w | x_0) p_ODE(x_0) / q(x_0 | w) ]                        (3)

A drift must be a function of x and t alone, so there is no step before: the flow of a self-conditioned model makes its
estimate twice at each point, as training does, xhat(x, t) = f(x, t, f(x, t, 0)). This is another process than the walk
of `bound`, even in the limit of many steps. Its trace goes through both calls: with a = f(x, t, 0), dxhat/dx is
df/dx + (df/da) (da/dx).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from text_diffusion.bound import Decoder, Posterior
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import TransformerNetModel

Predict = Callable[[Tensor, float], Tensor]  # x (B, L, D), t in 0..T-1, between two steps too -> xhat (B, L, D)
Trace = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor]]  # f, x -> f(x), tr df/dx (B,)


def predict_twice(model: TransformerNetModel, process: GaussianDiffusion, condition: Tensor | None = None) -> Predict:
    """xhat(x, t) of eq. (1): a self-conditioned model is asked twice, one that is not once. t may lie between steps.

    Sentences may be given something (`condition`).
    """

    def predict(x: Tensor, t: float) -> Tensor:
        time = torch.full((len(x),), t * process.time_scale, device=x.device)
        x_self = model(x, time, condition=condition) if model.config.self_condition else None
        return model(x, time, x_self, condition=condition)  # type: ignore[no-any-return]

    return predict


def exact_trace(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and the trace of its Jacobian, (B, L, D) -> (B, L, D), (B,): a backward pass for each of the L D entries."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        flat = y.flatten(1).sum(dim=0)
        rows = (torch.autograd.grad(flat[i], x, retain_graph=True)[0].flatten(1)[:, i] for i in range(len(flat)))
        trace = torch.stack(list(rows)).sum(dim=0)
    return y.detach(), trace


def hutchinson_trace(probes: Tensor, f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and an unbiased estimate of the trace: the mean of v . (df/dx) v over probes v (M, B, L, D) of +-1.

    (FFJORD, Grathwohl et al. 2019, arXiv 1810.01367, eq. 7.) The probes stay the same along a trajectory.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        vjps = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in probes]
    return y.detach(), torch.stack([(v * g).flatten(1).sum(dim=1) for v, g in zip(probes, vjps, strict=True)]).mean(0)


def no_trace(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) alone, where the density is not asked for."""
    with torch.no_grad():
        return f(x), x.new_zeros(len(x))


def flow(
    predict: Predict, process: GaussianDiffusion, x: Tensor, start: int, stop: int, steps: int, trace: Trace
) -> tuple[Tensor, Tensor]:
    """Follow eq. (1) from x_start (B, L, D) to x_stop, and the integral of the divergence along the way, (B,).

    Fourth-order Runge-Kutta, evenly spaced in phi: the error falls with the fourth power of `steps` where the network
    is smooth in t; what is left of it may lie on either side, so that with few steps the figure is no bound.
    """
    phis = np.arccos(np.sqrt(process.alphas_cumprod))  # of each step
    n = x[0].numel()

    def drift(x: Tensor, phi: float) -> tuple[Tensor, Tensor]:
        t = float(np.interp(phi, phis, process.timesteps))
        xhat, divergence = trace(lambda x: predict(x, t), x)
        return (math.cos(phi) * x - xhat) / math.sin(phi), (math.cos(phi) * n - divergence) / math.sin(phi)

    h = (phis[stop] - phis[start]) / steps
    total = x.new_zeros(len(x))
    for i in range(steps):
        phi = phis[start] + i * h
        k1, d1 = drift(x, phi)
        k2, d2 = drift(x + h / 2 * k1, phi + h / 2)
        k3, d3 = drift(x + h / 2 * k2, phi + h / 2)
        k4, d4 = drift(x + h * k3, phi + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return x, total


def ode_log_density(
    predict: Predict, process: GaussianDiffusion, x: Tensor, steps: int, trace: Trace, s: int = 0
) -> Tensor:
    """log p_ODE(x_s) in nats of x_s (B, L, D), eq. (2), (B,)."""
    last, divergence = flow(predict, process, x, s, process.num_timesteps - 1, steps, trace)
    return log_normal(last) + divergence


def ode_log_weight(
    predict: Predict,
    decoder: Decoder,
    process: GaussianDiffusion,
    posterior: Posterior,
    x_start_mean: Tensor,
    noise: Tensor,
    steps: int,
    trace: Trace,
    handover: int = 0,
) -> Tensor:
    """log p(w | x_0) p_ODE(x_s) / q(x_s | w) at x_s ~ q(x_s | w), x_0 being where the flow takes it, in nats, (B,).

    The flow is one to one, so that this is of the same P(w) for every s = handover, with a proposal for x_0 that knows
    w down to s only. The mean bounds log P(w) from below, with Hutchinson's trace too; the log of the mean of the
    exponential estimates log P(w) itself, but with the exact trace only: exp of an unbiased estimate is not one.
    """
    q = posterior.marginal(x_start_mean, handover)
    x = q.sample(noise)
    log_q = log_normal(noise) - 0.5 * noise[0].numel() * math.log(posterior.v[handover])
    x_0 = flow(predict, process, x, handover, 0, steps, no_trace)[0] if handover else x
    with torch.no_grad():
        log_p_words = decoder(predict(x_0, float(process.timesteps[0])))
    return log_p_words + ode_log_density(predict, process, x, steps, trace, handover) - log_q


def log_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) in nats, (B, L, D) -> (B,)."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1)
