"""p(label | x_t): a small transformer over the noised sentence, in the diffusion model's own space and schedule.

Guidance multiplies its gradient by sigma_t^2 / alpha_t, which is in the thousands where all is noise, so that the least
of its errors would count there. It therefore sees x_t as what a Gaussian prior of the embeddings' variance tau^2 would
make of it,

    u = E[x_0 | x_t] = alpha_t tau^2 / (alpha_t^2 tau^2 + sigma_t^2) x_t,

whose scale is that of x_0 at every t: then the gradient carries the factor that the true one has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from text_diffusion import checkpoint
from text_diffusion.config import ModelConfig
from text_diffusion.control.steering import LEAST_SIGNAL, Predict
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.modeling import EncoderLayer, timestep_embedding

if TYPE_CHECKING:
    from text_diffusion.generation import TextDiffusion


@dataclass(frozen=True)
class Sizes:
    """What a classifier's network is made of."""

    in_channel: int
    sequence_len: int
    labels: int
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4


class NoisyClassifier(nn.Module):
    """(B, L, D) at network times (B,) -> logits of the labels (B, C).

    Args:
        sizes: of the network.
        process: the forward process of training.
        tau: standard deviation of the embeddings' entries.
    """

    def __init__(self, sizes: Sizes, process: GaussianDiffusion, tau: float) -> None:
        super().__init__()
        H = sizes.hidden_size
        config = ModelConfig(hidden_size=H, num_heads=sizes.num_heads, activation="gelu")
        self.sizes, self.tau, self.time_scale = sizes, tau, process.time_scale
        abar = torch.as_tensor(process.alphas_cumprod, dtype=torch.float32, device=process.device)
        self.scale: Tensor  # (T,): u / (tau x_t)
        self.register_buffer("scale", abar.sqrt() * tau / (abar * tau**2 + 1 - abar), persistent=False)
        self.time_embed = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H))
        self.input_up_proj = nn.Linear(sizes.in_channel, H)
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.sequence_len + 1, H))  # the first one reads the others
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(sizes.num_layers))
        self.final_norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, sizes.labels)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Logits of the labels."""
        t = (timesteps / self.time_scale).round().long()
        u = self.scale[t][:, None, None] * x_t  # about unit variance
        h = self.input_up_proj(u)  # (B, L, H)
        h = torch.cat([torch.zeros_like(h[:, :1]), h], dim=1) + self.positions[: h.shape[1] + 1]
        h = h + self.time_embed(timestep_embedding(timesteps, self.sizes.hidden_size))[:, None]
        for layer in self.layers:
            h = layer(h)
        logits: Tensor = self.head(self.final_norm(h[:, 0]))
        return logits


@dataclass(frozen=True)
class Classifier:
    """A trained network, what its outputs mean, and which model it is for."""

    network: NoisyClassifier
    labels: tuple[str, ...]
    model: str  # fingerprint
    name: str  # of the weights file it was trained on

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        contents = {
            "classifier": asdict(self.network.sizes),
            "tau": self.network.tau,
            "labels": list(self.labels),
            "for_model": self.model,
            "for_name": self.name,
            "state": {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()},
        }
        checkpoint.write(path, contents)


def new(writer: TextDiffusion, labels: Sequence[str], sizes: Sizes, name: str) -> Classifier:
    """An untrained classifier for a model."""
    tau = float(writer.model.embeddings.detach().square().mean().sqrt())
    network = NoisyClassifier(sizes, writer.diffusion, tau).to(writer.diffusion.device)
    return Classifier(network, tuple(labels), fingerprint(writer), name)


def beside(weights: Path) -> Path:
    """Where the classifier of a weights file lies unless somebody says otherwise."""
    return weights.with_name(f"{weights.stem}.classifier.pt")


def load(path: str | Path, writer: TextDiffusion) -> Classifier:
    """Read a classifier for a model.

    Raises:
        UserError: there is none, the file is something else, or it is for another model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"--label expects a classifier, found none at {path}; `python -m text_diffusion.control.train_classifier "
            "CKPT` makes one, and --classifier FILE names another"
        )
    contents = checkpoint.read(path)
    if not {"classifier", "labels", "for_model", "state"} <= contents.keys():
        raise UserError(f"{path}: expected a classifier, found another kind of file")
    if contents["for_model"] != fingerprint(writer):
        raise UserError(
            f"{path}: expected a classifier of these weights, found that of {contents['for_name']}, whose embeddings "
            "or noise are others; train one for these"
        )
    try:
        network = NoisyClassifier(Sizes(**contents["classifier"]), writer.diffusion, contents["tau"])
        network.load_state_dict(contents["state"])
    except (TypeError, RuntimeError, KeyError, UserError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: expected a classifier, found one whose parts do not fit: {reason}") from None
    if not is_finite(network):
        raise UserError(
            f"{path}: expected finite weights, found a classifier whose training has failed; train it again"
        )
    network.to(writer.diffusion.device).eval().requires_grad_(False)
    return Classifier(network, tuple(contents["labels"]), contents["for_model"], contents["for_name"])


def is_finite(network: NoisyClassifier) -> bool:
    """Whether all weights are numbers."""
    return all(bool(weight.isfinite().all()) for weight in network.parameters())


def fingerprint(writer: TextDiffusion) -> str:
    """Changes with the embeddings, the schedule or the vocabulary: what a classifier's input consists of."""
    digest = hashlib.sha256(writer.model.word_embedding.weight.detach().cpu().numpy().tobytes())
    digest.update(writer.diffusion.betas.tobytes())
    digest.update(repr(sorted(writer.tokenizer.backend.get_vocab().items())).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Label:
    """Sentences of a label, or of any of several, by a classifier.

    Args:
        classifier: trained for the model.
        label: one that it knows; or several, of which any will do.
        strength: factor of the gradient; 1 is Bayes' rule, more makes up for what the classifier does not see.
        low: least and
        high: greatest t at which to guide (None: T - 1).
    """

    classifier: Classifier
    label: str | tuple[str, ...]
    strength: float = 2.5
    low: int = 0
    high: int | None = None

    @property
    def numbers(self) -> list[int]:
        """The labels' outputs.

        Raises:
            UserError: one is not known.
        """
        wanted = (self.label,) if isinstance(self.label, str) else self.label
        for label in wanted:
            if label not in self.classifier.labels:
                known = ", ".join(self.classifier.labels)
                raise UserError(f"--label must be one that the classifier knows: {known}; found {label!r}")
        return [self.classifier.labels.index(label) for label in wanted]

    def of(self, writer: TextDiffusion) -> Label:
        """Checked against a model.

        Raises:
            UserError: the label is not known, a number is out of range, or the classifier is for another model.
        """
        T = writer.diffusion.num_timesteps
        assert self.numbers
        if self.classifier.model != fingerprint(writer):
            raise UserError(f"--label expects a classifier of these weights, found that of {self.classifier.name}")
        high = T - 1 if self.high is None else self.high
        if not 0 <= self.low <= high < T:
            raise UserError(f"--guidance_range must lie within 0-{T - 1}, found {self.low}-{high}")
        most = int((writer.diffusion.alphas_cumprod >= LEAST_SIGNAL).nonzero()[0].max())
        if self.low > most:
            raise UserError(
                f"--guidance_range must begin at t {most} or below, where enough of the signal is left to guide by, "
                f"found {self.low}-{high}"
            )
        if not self.strength > 0:
            raise UserError(f"--guidance_strength must be above 0, found {self.strength:g}")
        return self

    def log_prob(self, x_t: Tensor, timesteps: Tensor, predict: Predict) -> Tensor:
        """log p(label | x_t), (B,); outside the range of t, 0."""
        t = float(timesteps[0]) / self.classifier.network.time_scale
        if not self.low - 0.5 < t < (torch.inf if self.high is None else self.high + 0.5):
            return 0.0 * x_t.flatten(1).sum(dim=1)
        log_p: Tensor = self.classifier.network(x_t, timesteps).log_softmax(dim=-1)
        return log_p[:, self.numbers].logsumexp(dim=-1)
