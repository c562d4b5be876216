"""What may be learned, by name: `--objective` picks a network and the loss of a batch; the training loop is one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from text_diffusion.autoregressive import CausalTransformer, WordTransformer, autoregressive_loss
from text_diffusion.config import DiffusionConfig, ModelConfig
from text_diffusion.cross_entropy import WordDenoiser, cross_entropy_loss
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise, diffusion_lm_loss
from text_diffusion.masked import MaskedTransformer, masked_loss
from text_diffusion.modeling import TransformerNetModel

Network = TransformerNetModel | WordTransformer


class Terms(Protocol):
    """A dataclass of the terms of a loss, each (B,), logged by their names."""

    def total(self, weights: Tensor | float = 1.0) -> Tensor:
        """The loss of each sentence, (B,); `weights` correct for how t was drawn."""


@dataclass(frozen=True)
class Objective:
    """A network and its loss.

    Args:
        network: of (ModelConfig, V, L, how many labels or tokens of a source).
        loss: of (network, process, w (B, L), t (B,), noise of the sentences, what they are given).
        by_t: the term that depends on t, which is logged by quarters of t and learned from where to look; "" without.
        foreign: settings that mean nothing to it, or that it fixes.
        process: settings of DiffusionConfig that are other than the defaults.
        model: of ModelConfig, likewise.
    """

    network: type[Network]
    loss: Callable[[Any, GaussianDiffusion, Tensor, Tensor, Noise, Tensor | None], Terms]
    by_t: str
    foreign: tuple[str, ...]
    process: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


OF_WORDS = ("output_prior", "denoised_input", "output_scale", "shared_evidence", "least_evidence", "known_words")
OBJECTIVES = {
    "cross_entropy": Objective(
        WordDenoiser, cross_entropy_loss, "cross_entropy", ("noise_schedule", "diffusion_steps")
    ),
    "diffusion_lm": Objective(
        TransformerNetModel,
        diffusion_lm_loss,
        "mse",
        OF_WORDS,
        {"noise_schedule": "sqrt", "diffusion_steps": 2000, "schedule_sampler": "uniform", "stratified": False},
        {"neighbours": 0, "in_channel": 32},
    ),
    "masked": Objective(
        MaskedTransformer,
        masked_loss,
        "nll",
        ("self_condition", "num_channels", *OF_WORDS, "noise_schedule", "diffusion_steps", "schedule_sampler"),
        {"schedule_sampler": "uniform"},
        {"in_channel": 32},
    ),
    "autoregressive": Objective(
        CausalTransformer,
        autoregressive_loss,
        "",
        ("self_condition", "num_channels", *OF_WORDS, *DiffusionConfig.__dataclass_fields__),
        {"schedule_sampler": "uniform", "stratified": False},
        {"in_channel": 32},
    ),
}


def implied(given: Collection[str]) -> str:
    """The objective that settings are of when none is named: the first, in this order, to which none is foreign.

    So `--noise_schedule` or `--diffusion_steps` alone means Diffusion-LM, as in the original. If there is none, it is
    the default.
    """
    knows = (name for name, objective in OBJECTIVES.items() if not set(objective.foreign) & set(given))
    return next(knows, ModelConfig.objective)


OF_BERT = ("activation", "norm")


def check_foreign(config: ModelConfig, given: Collection[str]) -> None:
    """Refuse settings that belong to other objectives, or to the other denoiser.

    Raises:
        UserError: naming the first of them.
    """
    for name in OBJECTIVES[config.objective].foreign:
        if name in given:
            its = " or ".join(other for other, objective in OBJECTIVES.items() if name not in objective.foreign)
            raise UserError(
                f"--{name} belongs to another objective: leave it out with --objective {config.objective}, or take "
                f"--objective {its}"
            )
    for name in OF_BERT if config.denoiser == "modern" else ():
        if name in given:
            raise UserError(f"--{name} belongs to --denoiser bert: leave it out with --denoiser modern")
