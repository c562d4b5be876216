"""The Python API: `load(path).sample(n, steps=...)`, which the command line uses too."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text_diffusion import checkpoint
from text_diffusion.autoregressive import Autoregressive, CausalTransformer
from text_diffusion.checkpoint import Weights
from text_diffusion.control.controls import Control, Plan, plan
from text_diffusion.control.template import with_unknown
from text_diffusion.control.vocabulary import Vocabulary
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.device import pick_device
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.loss_by_timestep import loss_curve
from text_diffusion.masked import Masked, MaskedTransformer
from text_diffusion.memory import in_batches
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.randomness import Stream, draw, normal, truncated_normal
from text_diffusion.remote import local
from text_diffusion.samplers import Denoise, Step, ancestral, ddim, dpm_solver, heun
from text_diffusion.sampling import Sampling
from text_diffusion.spacing import churned, closing_power, spaced_timesteps
from text_diffusion.tokenizer import Tokenizer

BATCH_MEMORY = 64 * 2**20  # bytes of activations or logits that a chosen batch may need at once
GPU_BATCH_MEMORY = 2**30


def load(path: str | Path, *, device: str = "auto", gpu: str = "all", tokenizer: str = "") -> Writer:
    """Load a weights file, ours or the original's (which needs its vocabulary file as `tokenizer`).

    Raises:
        ValueError: the file is missing, truncated or foreign; the device is not there.
    """
    return writer_of(checkpoint.load_weights(local(str(path)), pick_device(device, gpu), tokenizer))


def load_diffusion(path: str | Path, *, device: str = "auto", gpu: str = "all", tokenizer: str = "") -> TextDiffusion:
    """Load a weights file that must hold a diffusion model; the rest as `load`."""
    writer = load(path, device=device, gpu=gpu, tokenizer=tokenizer)
    if not isinstance(writer, TextDiffusion):
        raise UserError(f"{path}: expected a diffusion model, found one of --objective masked or autoregressive")
    return writer


def writer_of(weights: Weights) -> Writer:
    """What writes sentences with a network and its tokenizer."""
    model, diffusion, tokenizer, length = weights.model, weights.diffusion, weights.tokenizer, weights.sequence_len
    if isinstance(model, TransformerNetModel):
        return TextDiffusion(model, diffusion, tokenizer, length, weights.info)
    labels = tuple(weights.info.get("labels", ()))
    if isinstance(model, MaskedTransformer):
        return Masked(model, tokenizer, length, diffusion.device, labels)
    assert isinstance(model, CausalTransformer), f"nothing writes with {type(model).__name__}"
    return Autoregressive(model, tokenizer, length, diffusion.device, labels)


@dataclass(frozen=True)
class TextDiffusion:
    """A trained model that writes sentences."""

    model: TransformerNetModel
    diffusion: GaussianDiffusion
    tokenizer: Tokenizer
    sequence_len: int
    info: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """Those that the model was trained with, by number."""
        return tuple(self.info.get("labels", ()))

    @property
    def is_student(self) -> bool:
        """Whether the first noise tells it the sentence (see `distillation`)."""
        return bool(self.info.get("train", {}).get("teacher"))

    def sample(
        self, n: int = 10, *, batch_size: int | None = None, controls: Sequence[Control] | Plan = (), **settings: Any
    ) -> list[str]:
        """n sentences; sentence i depends on the seed and on i, not on n or on the batch size.

        Args:
            n: how many.
            batch_size: sentences at once; chosen by size if not given.
            controls: what the sentences must be like (see `control`).
            settings: those of `Sampling`: steps=50, seed=10708, sampler="auto", ...

        Raises:
            ValueError: an argument is out of range.
        """
        if n < 0:
            raise UserError(f"the number of samples must not be negative, found {n}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"the batch size must be at least 1, found {batch_size}")

        steered = controls if isinstance(controls, Plan) else self.plan(controls, settings.get("sequence_len"))

        def make(start: int, stop: int) -> list[str]:
            last = deque(self.denoising(start, stop, steered, **settings), maxlen=1).pop()
            return self.decode(last.pred_xstart, unknown=steered.unknown)

        return in_batches(n, batch_size or self.choose_batch_size(n, steered), make)

    @torch.inference_mode(False)  # steering asks for gradients, wherever it is called from
    def plan(self, controls: Sequence[Control], sequence_len: int | None = None) -> Plan:
        """What controls come to for this model, checked.

        Raises:
            ValueError: they contradict each other or cannot be met.
        """
        length = sequence_len or self.sequence_len
        if not 3 <= length <= self.sequence_len:
            raise UserError(f"SEQ_LEN must be between 3 and {self.sequence_len}, the model's, found {length}")
        return plan(controls, self, length)

    def chosen(self, how: Sampling, plan: Plan) -> Sampling:
        """The settings with a sampler in the place of "auto"."""
        words = isinstance(self.model, WordDenoiser) and not plan.is_random
        return how.chosen(plan.fills, words, self.is_student)

    @torch.inference_mode(False)
    def denoising(
        self, start: int, stop: int, controls: Sequence[Control] | Plan = (), **settings: Any
    ) -> Iterator[Step]:
        """The sentences start..stop-1 of a seed, step by step; settings are those of `Sampling`.

        Raises:
            ValueError: an argument is out of range (at once, not at the first step).
        """
        T = self.diffusion.num_timesteps
        steered = controls if isinstance(controls, Plan) else self.plan(controls, settings.get("sequence_len"))
        levels = steered.levels(T)
        how = self.chosen(Sampling(**{"steps": min(Sampling.steps, levels)} | settings), steered)
        if how.halt is not None and steered.is_needed:
            raise UserError(
                "halt leaves alone what seems settled by its words, and controls may move it yet: "
                "leave one of the two out"
            )
        if steered.is_random and (how.sampler != "ancestral" or how.resample):
            raise UserError(
                "Langevin steps belong to the sampler ancestral, which draws noise, once at each level, found "
                + (f"resample {how.resample}" if how.resample else how.sampler)
            )
        length = how.sequence_len or self.sequence_len
        if how.clamp_start is not None and not 1 <= how.clamp_start <= T:
            raise UserError(f"clamp_start must be between 1 and {T}, found {how.clamp_start}")
        if how.temperature is not None and not isinstance(self.model, WordDenoiser):
            raise UserError(
                "a temperature expects probabilities of words (--objective cross_entropy), found no such model"
            )
        if levels < how.steps <= T:
            raise UserError(
                f"STEPS must be between 1 and {levels}, the levels of noise that --edit_strength leaves of {T}, "
                f"found {how.steps}"
            )
        process, sampler = self._sampler(how, levels)
        steered.check_calls(process)
        shape, device = (length, self.model.config.in_channel), self.diffusion.device
        inner = normal if how.top_p is None else truncated_normal(how.top_p)

        def noise(s: int) -> Tensor:
            distribution = normal if s == process.num_timesteps else inner
            drawn = draw(distribution, (how.seed, Stream.SAMPLE, s), start, stop, shape, device)
            return drawn if s != process.num_timesteps else steered.start(drawn, self.model, process)

        warmth = {} if how.temperature is None else {"temperature": how.temperature}
        network = steered.network(self.model, start, stop)

        def denoise(x_t: Tensor, t: Tensor, previous: Tensor | None, rows: Tensor | None = None) -> Tensor:
            pred_xstart = network(x_t, process.network_time(t), previous, rows, **warmth)
            if how.clamp and process.timesteps[int(t[0])] < (how.clamp_start or T):
                pred_xstart = nearest_embedding(pred_xstart, self.model.embeddings)
            return pred_xstart

        settled: Denoise = denoise if how.halt is None else Halting(denoise, self.model, how.halt)
        if steered.is_needed:

            def inner_noise(s: int, k: int) -> Tensor:
                return draw(normal, (how.seed, Stream.CONTROL, s, k), start, stop, shape, device)

            settled = steered.steer(denoise, network, process, inner_noise, how.temperature or 1.0)
        return _without_grad(sampler(settled, process, noise))

    def kept_by(self, how: Sampling, T: int) -> list[int]:
        """The timesteps at which the network is called, of the first T of training.

        Raises:
            UserError: more of them than there are.
        """
        abar = self.diffusion.alphas_cumprod[:T]
        means = self.info.get("loss_by_timestep")
        loss = loss_curve(means, self.diffusion.num_timesteps)[:T] if means else None
        spaced_timesteps(abar, how.steps)  # the range that is named in an error is that of the calls
        words = isinstance(self.model, WordDenoiser)
        length = how.sequence_len or self.sequence_len
        closing = closing_power(how.levels, length * float(loss[-1])) if words and loss is not None else None
        return spaced_timesteps(abar, how.levels, how.spacing, loss, closing)

    def _sampler(self, how: Sampling, levels: int) -> tuple[GaussianDiffusion, Callable[..., Iterator[Step]]]:
        """The process that the settings keep of the first `levels` of training, and the generator that walks it."""
        kept = self.kept_by(how, levels)
        if how.sampler == "ancestral":
            visits = [1, *np.diff(np.linspace(0, how.steps - 1, len(kept)).round().astype(int)).tolist()]
            return self.diffusion.respace(kept), partial(ancestral, visits=visits)
        if how.sampler == "ddim":
            return self.diffusion.respace(kept), partial(ddim, eta=how.eta or 0.0)
        together, stops = churned(self.diffusion.alphas_cumprod[:levels], kept, how.churn or 0.0)
        if how.sampler == "dpm-solver++":
            return self.diffusion.respace(together), partial(dpm_solver, stops=stops)
        even = how.steps % 2 == 0  # two calls a step, one for the first, and one at t = 0
        return self.diffusion.respace(together), partial(heun, stops=stops, correct_first=False, correct_last=even)

    @torch.no_grad()
    def decode(self, x: Tensor, whole: bool = False, unknown: Sequence[str] = ()) -> list[str]:
        """Round (B, L, D) to words by the tied head, and to sentences; `whole` keeps what follows [SEP].

        The words of `unknown` take the places of the first [UNK]s.
        """
        ids = self.model.get_logits(x).argmax(dim=-1).tolist()
        if whole:
            return [self.tokenizer.decode_all(row) for row in ids]
        if unknown:
            vocabulary = Vocabulary(self.tokenizer)
            return [with_unknown(vocabulary, row, unknown) for row in ids]
        return [self.tokenizer.decode(row) for row in ids]

    def choose_batch_size(self, n: int, plan: Plan | None = None) -> int:
        """As many sentences at once as memory allows, at most 256 on a CPU, whose caches are small."""
        config = self.model.config
        edges = len(plan.accepting.emits) if plan is not None and plan.accepting is not None else 0
        widest = max(self.tokenizer.vocab_size, 4 * config.hidden_size, config.num_heads * self.sequence_len, edges)
        on_cpu = self.diffusion.device.type == "cpu"
        most, memory = (256, BATCH_MEMORY) if on_cpu else (16384, GPU_BATCH_MEMORY)
        return max(1, min(n, most, memory // (4 * widest * self.sequence_len)))


Writer = TextDiffusion | Masked | Autoregressive


def nearest_embedding(x: Tensor, embeddings: Tensor) -> Tensor:
    """Clamping (Diffusion-LM section 4.2): each entry (..., D) is replaced by the embedding nearest to it.

    A gradient goes through as if nothing were done (straight-through), so that scores can be followed.
    """
    # argmin |x - e|^2 = argmax x.e - |e|^2 / 2
    scores = x @ embeddings.T - embeddings.square().sum(dim=1) / 2
    nearest = embeddings[scores.argmax(dim=-1)]
    return x + (nearest - x).detach() if x.requires_grad else nearest


class Halting:
    """A denoiser that leaves a sentence alone once its words have not changed for `patience` calls.

    Of a sentence that has settled the last prediction stays; the network sees only the others.
    """

    def __init__(self, denoise: Callable[..., Tensor], model: TransformerNetModel, patience: int) -> None:
        self.denoise, self.model, self.patience = denoise, model, patience
        self.words = self.unchanged = torch.empty(0)

    def __call__(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if previous is None:
            pred_xstart = self.denoise(x_t, t, None)
            self.words = self.model.get_logits(pred_xstart).argmax(dim=-1)  # (B, L)
            self.unchanged = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
            return pred_xstart
        moving = (self.unchanged < self.patience).nonzero().squeeze(1)
        pred_xstart = previous.clone()
        if len(moving):
            pred_xstart[moving] = self.denoise(x_t[moving], t[moving], previous[moving], moving)
            words = self.model.get_logits(pred_xstart[moving]).argmax(dim=-1)
            same = (words == self.words[moving]).all(dim=1)
            self.unchanged[moving] = torch.where(same, self.unchanged[moving] + 1, 0)
            self.words[moving] = words
        return pred_xstart


def _without_grad(steps: Iterator[Step]) -> Iterator[Step]:
    """Run a generator's body without autograd; the body of the caller's loop keeps its own mode."""
    while True:
        with torch.inference_mode(False), torch.no_grad():
            step = next(steps, None)
        if step is None:
            return
        yield step
