"""The forward process q, its posterior, and the reverse process p: the algebra, without loops.

    q(x_t | x_{t-1}) = N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t I)

Equations: Ho et al. 2020 (arXiv 2006.11239), called DDPM below. Shapes: x_* (B, L, D), t (B,) int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from text_diffusion.schedules import Array


@dataclass(frozen=True)
class Gaussian:
    """N(mean, variance I): mean (B, L, D), variance (B, 1, 1)."""

    mean: Tensor
    variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, shape (B, L, D)."""
        return self.mean + self.variance.sqrt() * noise


class GaussianDiffusion:
    """A noise schedule and everything that follows from it in closed form.

    Args:
        betas: (S,) float64.
        device: where the tables live.
        timesteps: of a process that keeps S of the T steps of training, which ones (ascending); all if not given.
        time_scale: by what the network sees t multiplied; 1000 / T if not given, so that it sees 0..1000.
    """

    def __init__(
        self,
        betas: Array,
        device: torch.device | str = "cpu",
        timesteps: Sequence[int] | None = None,
        time_scale: float | None = None,
    ) -> None:
        def table(values: npt.NDArray[np.floating]) -> Tensor:  # computed in float64, used in float32
            return torch.as_tensor(values, dtype=torch.float32, device=device)

        self.betas = betas
        self.alphas_cumprod: Array = np.cumprod(1 - betas, dtype=np.float64)
        abar = self.alphas_cumprod
        self.num_timesteps = len(betas)
        self.timesteps = list(range(len(betas)) if timesteps is None else timesteps)
        self.time_scale = 1000 / len(betas) if time_scale is None else time_scale
        self.device = torch.device(device)
        self._network_time = torch.tensor(self.timesteps, dtype=torch.float32, device=device) * self.time_scale

        self.sqrt_alphas_cumprod = table(np.sqrt(abar))
        self.one_minus_alphas_cumprod = table(1 - abar)
        self.sqrt_one_minus_alphas_cumprod = table(np.sqrt(1 - abar))

        # DDPM eq. 7: q(x_{t-1} | x_t, x_0). At t = 0 there is nothing before x_0: mean x_0, variance 0.
        abar_prev = np.concatenate([[1.0], abar[:-1]])
        self.posterior_mean_coef_start = table(betas * np.sqrt(abar_prev) / (1 - abar))
        self.posterior_mean_coef_t = table((1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar))
        self.posterior_variance = table(betas * (1 - abar_prev) / (1 - abar))
        self.sqrt_alphas_cumprod_prev = table(np.sqrt(abar_prev))
        self.one_minus_alphas_cumprod_prev = table(1 - abar_prev)

    def respace(self, timesteps: Sequence[int]) -> GaussianDiffusion:
        """The same process seen only at `timesteps` (ascending): its abar is the training one at those steps.

        (Nichol & Dhariwal 2021, arXiv 2102.09672, section 4: beta'_s = 1 - abar_{t_s} / abar_{t_{s-1}}.)
        """
        kept = self.alphas_cumprod[list(timesteps)]
        betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
        return GaussianDiffusion(betas, self.device, [self.timesteps[t] for t in timesteps], self.time_scale)

    def network_time(self, t: Tensor) -> Tensor:
        """Timesteps as the network sees them: 0..1000 whatever T is and however few are kept, (B,) -> (B,) float32."""
        return self._network_time[t]

    def q_start(self, x_start_mean: Tensor) -> Gaussian:
        """q(x_0 | w) = N(E(w), (1 - abar_0) I): the first, smallest noise (Diffusion-LM section 4.1)."""
        return Gaussian(x_start_mean, self.one_minus_alphas_cumprod[:1, None, None])

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (DDPM eq. 4)."""
        return Gaussian(_at(self.sqrt_alphas_cumprod, t) * x_start, _at(self.one_minus_alphas_cumprod, t))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM eq. 4)."""
        return _at(self.sqrt_alphas_cumprod, t) * x_start + _at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def q_step(self, x_prev: Tensor, t: int, noise: Tensor) -> Tensor:
        """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise (DDPM eq. 2)."""
        beta = float(self.betas[t])
        return math.sqrt(1 - beta) * x_prev + math.sqrt(beta) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7."""
        mean = _at(self.posterior_mean_coef_start, t) * x_start + _at(self.posterior_mean_coef_t, t) * x_t
        return Gaussian(mean, _at(self.posterior_variance, t))

    def p_mean_variance(self, pred_xstart: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """p(x_{t-1} | x_t) = q(x_{t-1} | x_t, x_0 = f(x_t, t)): the denoiser's guess stands in for x_0."""
        return self.q_posterior_mean_variance(pred_xstart, x_t, t)

    def ddim_mean_variance(self, pred_xstart: Tensor, x_t: Tensor, t: Tensor, eta: float) -> Gaussian:
        """DDIM's p(x_{t-1} | x_t) (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

        The noise in x_t is kept but for a share that is drawn anew: none of it at eta = 0; at eta = 1 as much as the
        posterior's variance, which makes it `p_mean_variance`.
        """
        eps = self.predict_eps_from_xstart(x_t, t, pred_xstart)
        variance = eta**2 * _at(self.posterior_variance, t)
        kept = (_at(self.one_minus_alphas_cumprod_prev, t) - variance).clamp(min=0).sqrt()
        return Gaussian(_at(self.sqrt_alphas_cumprod_prev, t) * pred_xstart + kept * eps, variance)

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise that turns x_0 into x_t."""
        signal = _at(self.sqrt_alphas_cumprod, t) * pred_xstart
        return (x_t - signal) / _at(self.sqrt_one_minus_alphas_cumprod, t)

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 that this noise turned into x_t."""
        return (x_t - _at(self.sqrt_one_minus_alphas_cumprod, t) * eps) / _at(self.sqrt_alphas_cumprod, t)


def _at(table: Tensor, t: Tensor) -> Tensor:
    """table[t] to stand before (B, L, D): (B, 1, 1), or (B, L, 1) where positions differ in t."""
    return table[t][:, None, None] if t.ndim == 1 else table[t][..., None]
