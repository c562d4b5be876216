"""What may be learned, by name: `--objective` picks a network and the loss of a batch; the training loop is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from text_diffusion.autoregressive import CausalTransformer, autoregressive_loss
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise, diffusion_lm_loss
from text_diffusion.modeling import TransformerNetModel

Network = TransformerNetModel | CausalTransformer


class Terms(Protocol):
    """A dataclass of the terms of a loss, each (B,), logged by their names."""

    def total(self, weights: Tensor | float = 1.0) -> Tensor:
        """The loss of each sentence, (B,); `weights` correct for how t was drawn."""


@dataclass(frozen=True)
class Objective:
    """A network and its loss.

    Args:
        network: of (ModelConfig, V, L).
        loss: of (network, process, w (B, L), t (B,), noise of the sentences).
        by_t: the term that depends on t, which is logged by quarters of t and learned from where to look; "" without.
    """

    network: type[Network]
    loss: Callable[[Any, GaussianDiffusion, Tensor, Tensor, Noise], Terms]
    by_t: str


OBJECTIVES = {
    "diffusion_lm": Objective(TransformerNetModel, diffusion_lm_loss, "mse"),
    "autoregressive": Objective(CausalTransformer, autoregressive_loss, ""),
}
