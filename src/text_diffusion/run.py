"""A training run: everything that is decided before the first step, for a new run or for one that goes on."""

from __future__ import annotations

import sys
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_diffusion import config as settings
from text_diffusion import corpus as corpora
from text_diffusion import tokenizer as tokenizers
from text_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from text_diffusion.data import Batches, choose_length, fit
from text_diffusion.distributed import pick_device, pick_precision
from text_diffusion.ema import EMA
from text_diffusion.errors import UserError
from text_diffusion.files import check_writable, line_number, project_root, remove_leftovers
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.objectives import OBJECTIVES, Network, Objective
from text_diffusion.randomness import Stream, mix
from text_diffusion.schedules import named_betas
from text_diffusion.state import TrainState, find_checkpoint
from text_diffusion.timesteps import TIMESTEP_SAMPLERS, LossByTimestep
from text_diffusion.tokenizer import Tokenizer
from text_diffusion.tracking import check_extra

GROUPS = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig)
# Settings that a run keeps for life: with another value it would not be the same run.
FIXED = {
    *ModelConfig.__dataclass_fields__,
    *DiffusionConfig.__dataclass_fields__,
    *("tokenizer", "sequence_len", "long_lines", "batch_size", "seed", "ema_rate"),
}


@dataclass(frozen=True)
class Run:
    """Everything that training needs and does not change."""

    folder: Path
    model_config: ModelConfig
    diffusion_config: DiffusionConfig
    data_config: DataConfig
    config: TrainConfig
    device: torch.device
    diffusion: GaussianDiffusion
    tokenizer: Tokenizer
    batches: Batches
    held_out: Tensor | None
    fingerprint: str
    id: str
    resumed_meter: dict[str, Any] | None  # sums of the log between two rows, from where the run was stopped

    @property
    def objective(self) -> Objective:
        """What is learned."""
        return OBJECTIVES[self.model_config.objective]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The four groups of settings as plain values."""
        return {
            "model": asdict(self.model_config),
            "diffusion": asdict(self.diffusion_config),
            "data": asdict(self.data_config),
            "train": asdict(self.config),
        }

    def save(self, state: TrainState, meter: dict[str, Any]) -> Path:
        """Write a checkpoint; returns the weights file to sample from, the first EMA's."""
        tokenizer = self.tokenizer.to_json()
        about = self.settings | {"sequence_len": self.data_config.sequence_len, "tokenizer": tokenizer}
        extra = {"settings": self.settings, "tokenizer": tokenizer, "fingerprint": self.fingerprint, "meter": meter}
        return state.save(self.folder, self.id, about, extra)[1]


def prepare(given: dict[str, Any]) -> tuple[Run, TrainState]:
    """Build a run, new or to go on with, from the flags that were given.

    Raises:
        UserError: a setting, a file or the folder will not do; nothing has been trained yet.
    """
    data_config = settings.build(DataConfig, given)
    name = corpora.dataset_name(data_config)
    folder = Path(given.get("checkpoint_path") or project_root() / "ckpts" / name)
    opt = find_checkpoint(folder)
    saved: dict[str, Any] = {}
    if opt is not None:
        for group in opt["settings"].values():
            saved |= group
        check_same_run(given, saved, folder)
    saved.pop("checkpoint_path", None)
    model_config = settings.build(ModelConfig, saved, given)
    if model_config.objective == "autoregressive":
        check_left_to_right(given)
    diffusion_config = settings.build(DiffusionConfig, saved, given)
    data_config = settings.build(DataConfig, saved, given)
    config = settings.build(TrainConfig, saved, given)
    device = pick_device(config.device, config.gpu)
    config = replace(config, precision=pick_precision(config.precision, device))

    corpus = corpora.load(data_config, folder)
    if opt is not None and opt["fingerprint"] != corpus.fingerprint:
        raise UserError(
            f"{corpus.source}: expected the text that the run in {folder} was started with, found another; "
            "give --checkpoint_path another folder to start a new run"
        )
    if opt is None:
        tokenizer, new_file = corpora.find_tokenizer(data_config, corpus)
    else:  # a run keeps its tokenizer, whatever has become of the file
        tokenizer, new_file = Tokenizer.from_json(opt["tokenizer"]), None
    data_config, train_ids, held_out = encode(data_config, corpus, tokenizer)

    check_extra(config.track)
    check_writable(folder)  # from here on files are written
    remove_leftovers(folder)
    if corpus.was_split:
        corpus.save_parts(folder)
    if new_file is not None:
        tokenizers.save(tokenizer, new_file)
        print(f"{new_file}: trained a {data_config.tokenizer} tokenizer", file=sys.stderr)

    run = Run(
        folder=folder,
        model_config=model_config,
        diffusion_config=diffusion_config,
        data_config=data_config,
        config=config,
        device=device,
        diffusion=GaussianDiffusion(
            named_betas(diffusion_config.noise_schedule, diffusion_config.diffusion_steps), device
        ),
        tokenizer=tokenizer,
        batches=Batches(train_ids.to(device), config.batch_size, config.seed),
        held_out=None if held_out is None else held_out.to(device),
        fingerprint=corpus.fingerprint,
        id=opt["run"] if opt else uuid.uuid4().hex,
        resumed_meter=opt["meter"] if opt else None,
    )
    state = new_state(run)
    if opt is not None:
        resume(run, state, opt, saved)
    return run, state


def encode(
    config: DataConfig, corpus: corpora.Corpus, tokenizer: Tokenizer
) -> tuple[DataConfig, Tensor, Tensor | None]:
    """Sentences to ids of one length, which is chosen here if the settings leave it open; reports unknown words."""
    train, held_out = tokenizer.encode(corpus.train), tokenizer.encode(corpus.held_out)
    length = config.sequence_len or choose_length(train + held_out)
    print(
        f"{corpus.name}: {len(train)} training and {len(held_out)} held-out sentences of up to {length} tokens, "
        f"{tokenizer.vocab_size} in the vocabulary; unknown words: {tokenizer.unknown_share(train):.2%} in training, "
        f"{tokenizer.unknown_share(held_out):.2%} held out",
        file=sys.stderr,
    )
    if tokenizer.unknown_share(train) > 0.01:
        print(
            "warning: the tokenizer does not know the training text; was it trained on another? "
            "remove its file, and it is trained again",
            file=sys.stderr,
        )

    def table(encoded: list[list[int]], lines: list[str], source: Path) -> Tensor:
        return fit(encoded, length, tokenizer, config.long_lines, str(source), lambda i: line_number(source, lines[i]))

    if config.long_lines == "drop" and held_out and min(map(len, held_out)) > length:
        print(f"warning: every held-out sentence is longer than {length} tokens: no validation", file=sys.stderr)
        held_out = []
    ids = table(train, corpus.train, corpus.source)
    held = table(held_out, corpus.held_out, corpus.held_out_source) if held_out else None
    return replace(config, sequence_len=length), ids, held


def new_state(run: Run) -> TrainState:
    """Freshly initialised weights, averages and optimizer."""
    torch.manual_seed(mix(run.config.seed, Stream.INIT))
    model: Network = run.objective.network(run.model_config, run.tokenizer.vocab_size, run.data_config.sequence_len)
    model = model.to(run.device).train()
    model.gradient_checkpointing = run.config.gradient_checkpointing
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.config.lr, weight_decay=run.config.weight_decay, fused=run.device.type != "mps"
    )
    sampler = TIMESTEP_SAMPLERS[run.diffusion_config.schedule_sampler](run.diffusion.num_timesteps, run.device)
    emas = [EMA(model, rate) for rate in run.config.ema_rate]
    return TrainState(model, emas, optimizer, sampler, LossByTimestep(run.diffusion.num_timesteps, run.device))


def resume(run: Run, state: TrainState, opt: dict[str, Any], saved: dict[str, Any]) -> None:
    """Restore the state of a run that was stopped, and say so.

    Raises:
        UserError: the run is already further than STEPS.
    """
    state.restore(run.folder, opt)
    for group in state.optimizer.param_groups:
        group["weight_decay"] = run.config.weight_decay  # may change; the learning rate is set at every step
    steps = run.config.steps
    if state.step > steps:
        raise UserError(f"STEPS must be at least {state.step}, where the run in {run.folder} is, found {steps}")
    print(f"going on from step {state.step} of the run in {run.folder}", file=sys.stderr)
    if steps != saved["steps"]:
        print(f"STEPS was {saved['steps']} and is {steps}: the learning-rate schedule changed", file=sys.stderr)


def check_same_run(given: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Refuse settings that the run in the folder was not started with.

    Raises:
        UserError: naming the first of them.
    """
    for name in sorted(FIXED & given.keys()):
        if given[name] != saved[name] and not (name == "sequence_len" and given[name] == 0):
            raise UserError(
                f"the run in {folder} was started with --{name} {saved[name]}, found {given[name]}; "
                "give --checkpoint_path another folder to start a new run"
            )


def check_left_to_right(given: dict[str, Any]) -> None:
    """Refuse flags that mean nothing to a model without noise.

    Raises:
        UserError: naming the first of them.
    """
    for name in ("self_condition", "num_channels", *DiffusionConfig.__dataclass_fields__):
        if name in given:
            raise UserError(f"--{name} belongs to diffusion models: leave it out with --objective autoregressive")
