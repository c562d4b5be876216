"""A training run: everything that is decided before the first step, for a new run or for one that goes on."""

from __future__ import annotations

import sys
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_diffusion import checkpoint, distillation, pretrained
from text_diffusion import corpus as corpora
from text_diffusion import tokenizer as tokenizers
from text_diffusion.checkpoint import resumable_steps
from text_diffusion.condition import dropped
from text_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from text_diffusion.data import Batches
from text_diffusion.deterministic import deterministic
from text_diffusion.device import check_compiler, pick_device, pick_precision
from text_diffusion.distillation import Teacher
from text_diffusion.distributed import ALONE, Ranks
from text_diffusion.ema import EMA
from text_diffusion.encoding import encode
from text_diffusion.errors import UserError
from text_diffusion.files import check_writable, project_root, remove_leftovers
from text_diffusion.flags import build
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.lock import FolderLock, check_shared
from text_diffusion.loss_by_timestep import LossByTimestep
from text_diffusion.mirror import Mirror
from text_diffusion.muon import optimizer_of
from text_diffusion.objectives import OBJECTIVES, Network, Objective, check_foreign, implied
from text_diffusion.original import check_own_settings
from text_diffusion.parallel import BatchLoss, check_shares, shard, synchronise
from text_diffusion.randomness import Stream, draw, mix, uniform
from text_diffusion.remote import cache_of, is_remote
from text_diffusion.resuming import check_unchanged, resume, saved_settings
from text_diffusion.schedules import named_betas
from text_diffusion.snapshot import Snapshot, check_safetensors, find_checkpoint, remove_stray_shards
from text_diffusion.state import TrainState
from text_diffusion.timesteps import TIMESTEP_SAMPLERS
from text_diffusion.tokenizer import Tokenizer
from text_diffusion.tracking import check_extra
from text_diffusion.validation import SENTENCES

GROUPS = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig)


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
    lock: FolderLock | None  # on rank 0
    resumed_meter: dict[str, Any] | None  # sums of the log between two rows, from where the run was stopped
    ranks: Ranks = ALONE
    mirror: Mirror | None = None  # of a folder in an object store; on rank 0
    held_out_given: Tensor | None = None  # what the held-out sentences are given, with --condition
    labels: tuple[str, ...] = ()  # with --condition labels
    start: pretrained.Origin | None = None  # whose weights a new run starts with
    teacher: Teacher | None = None  # of a student
    held_out_noise: Tensor | None = None  # of the held-out sentences of a student

    @property
    def objective(self) -> Objective:
        """What is learned."""
        return OBJECTIVES[self.model_config.objective]

    def shown(self, path: Path) -> str:
        """A file of the run as the user knows it."""
        return f"{self.mirror.url}/{path.name}" if self.mirror else str(path)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The four groups of settings as plain values."""
        return {
            "model": asdict(self.model_config),
            "diffusion": asdict(self.diffusion_config),
            "data": asdict(self.data_config),
            "train": asdict(self.config),
        }

    def said_given(self, number: int) -> str:
        """What a held-out sentence is given, as a text before it; nothing without a condition."""
        if self.held_out_given is None:
            return ""
        given = self.held_out_given[number % len(self.held_out_given)]
        label = self.labels[int(given)] if self.labels else self.tokenizer.decode(given.tolist())
        return f"{label} -> "

    def network(self) -> Network:
        """A new one, on the device."""
        network: Network = self.objective.network(
            self.model_config,
            self.tokenizer.vocab_size,
            self.data_config.sequence_len,
            len(self.labels) or self.data_config.source_len,
        )
        network.word_embedding.weight.requires_grad_(not self.model_config.freeze_embeddings)
        return network.to(self.device)

    def snapshot(self, state: TrainState, meter: dict[str, Any]) -> Snapshot:
        """A checkpoint of this step, in memory; every rank takes one at once."""
        tokenizer = self.tokenizer.to_json()
        about = self.settings | {"sequence_len": self.data_config.sequence_len, "tokenizer": tokenizer}
        about |= {"labels": list(self.labels)} if self.labels else {}
        extra: dict[str, Any] = {
            "settings": self.settings,
            "tokenizer": tokenizer,
            "fingerprint": self.fingerprint,
            "meter": meter,
        }
        extra |= {"world_size": self.ranks.size, "teacher": self.teacher.fingerprint if self.teacher else ""}
        return state.snapshot(self.ranks, self.id, about, extra)


def prepare(given: dict[str, Any], ranks: Ranks = ALONE) -> tuple[Run, TrainState]:
    """Build a run, new or to go on with, from the flags that were given.

    Rank 0 alone looks into the folder of the run; the others have what is in it from there.

    Raises:
        UserError: a setting, a file or the folder will not do; nothing has been trained yet.
    """
    ranks.agree("flags", {f"--{name}": value for name, value in given.items()})
    data_config = build(DataConfig, given)
    name = corpora.dataset_name(data_config)
    name += "-student" if given.get("teacher") else ""
    path = given.get("checkpoint_path") or str(project_root() / "ckpts" / name)
    mirror = ranks.together(lambda: Mirror(path) if is_remote(path) and ranks.first else None)
    folder = cache_of(path) if is_remote(path) else Path(path)
    try:
        return _prepare(given, ranks, folder, mirror)
    except BaseException:
        if mirror:
            mirror.lock.release()
        raise


def _prepare(given: dict[str, Any], ranks: Ranks, folder: Path, mirror: Mirror | None) -> tuple[Run, TrainState]:
    """`prepare`, for a folder on this machine."""
    there = resumable_steps(folder)
    ranks.on_first(lambda: check_own_settings(folder, bool(there)))
    opt = ranks.on_first(lambda: find_checkpoint(folder))
    saved = saved_settings(opt, given, folder, ranks)
    teacher = ranks.together(lambda: distillation.find(given, saved))
    distillation.check_same(teacher, opt, folder)
    start = (teacher or ranks.on_first(lambda: pretrained.find(given))) if opt is None else None
    saved = start.settings if start else saved
    model_config, diffusion_config, data_config, config = _configs(saved, given)
    check_shares(config.batch_size, ranks)
    sharded = ranks.size > 1 and (config.parallel == "fsdp" or bool(opt and opt.get("shards")))
    if sharded:
        check_safetensors()
    device, config = _on_device(config, ranks)

    corpus = _corpus(data_config, model_config.condition, opt, folder, ranks)
    if opt:  # a run keeps its tokenizer, whatever has become of the file
        text, new_file = opt["tokenizer"], None
    else:
        text, new_file = ranks.on_first(lambda: pretrained.tokenizer_of(data_config, corpus, start))
    tokenizer = Tokenizer.from_json(text)
    ids = encode(data_config, corpus, tokenizer).to(device)
    if start:
        start.check_text(corpus, ids.config.sequence_len)
    check_extra(config.track)

    def occupied() -> FolderLock | None:  # from here on files are written
        if not ranks.first:
            return None
        lock = occupy(folder, mirror, corpus, ids.config, tokenizer, new_file)
        check_unchanged(folder, there, lock)
        return lock

    betas = named_betas(diffusion_config.noise_schedule, diffusion_config.diffusion_steps)
    run = Run(
        folder=folder,
        model_config=model_config,
        diffusion_config=diffusion_config,
        data_config=ids.config,
        config=config,
        device=device,
        diffusion=GaussianDiffusion(betas, device),
        tokenizer=tokenizer,
        batches=Batches(ids.train, config.batch_size, config.seed, ids.given),
        held_out=ids.held_out,
        held_out_given=ids.held_out_given,
        labels=corpus.labels,
        fingerprint=corpus.fingerprint,
        id=ranks.broadcast(opt["run"] if opt else uuid.uuid4().hex),
        lock=ranks.together(occupied),
        resumed_meter=opt["meter"] if opt else None,
        ranks=ranks,
        mirror=mirror,
        start=start,
        teacher=teacher,
    )
    try:
        return begun(run, opt, saved, sharded)
    except BaseException:
        if run.lock:
            run.lock.release()
        raise


def begun(run: Run, opt: dict[str, Any] | None, saved: dict[str, Any], sharded: bool) -> tuple[Run, TrainState]:
    """The run and its state before its first step, or before the one after its checkpoint's."""
    if run.teacher and (opt is None or opt["step"] < run.config.steps):
        with deterministic(run.config.deterministic):
            run = taught(run, run.teacher)
    if sharded:
        check_shared(run.folder, run.ranks)
    state = new_state(run, opt)
    if opt is not None:
        resume(run, state, opt, saved)
    return run, state


def taught(run: Run, teacher: Teacher) -> Run:
    """The run of a student, which learns from the text's sentences and the noise that each belongs to."""
    config = run.config

    def noise_of(ids: Tensor, given: Tensor | None, part: int) -> Tensor:
        key = config.seed, Stream.PAIRS, part
        return teacher.follow_back(ids, given, key, config.teacher_levels, run.device, run.ranks)

    ids, given = run.batches.first(config.pairs)
    if given is not None:  # what a sentence is given decides its noise, so that it is dropped here, once for all
        u = draw(uniform, (config.seed, Stream.PAIRS, 3), 0, len(ids), (), run.device)
        given = dropped(given, u < run.model_config.drop_condition)
    print(f"{teacher.path} follows {len(ids):,} sentences back to their noise", file=sys.stderr)
    batches = Batches(ids, config.batch_size, config.seed, given, noise_of(ids, given, 1))
    if run.held_out is None:
        return replace(run, batches=batches)
    asked, held_out_given = run.held_out[:SENTENCES], run.held_out_given
    print(f"and {len(asked):,} held-out ones", file=sys.stderr)
    given = None if held_out_given is None else held_out_given[:SENTENCES]
    return replace(run, batches=batches, held_out_noise=noise_of(asked, given, 2))


def _configs(
    saved: dict[str, Any], given: dict[str, Any]
) -> tuple[ModelConfig, DiffusionConfig, DataConfig, TrainConfig]:
    """The settings of the run: what was given beats what was saved, and that the objective's own and the defaults."""
    name = build(ModelConfig, {"objective": (saved | given).get("objective") or implied(given)}).objective
    objective = OBJECTIVES[name]
    model_config = build(ModelConfig, objective.model, {"objective": name}, saved, given)
    check_foreign(model_config, given)
    return (
        model_config,
        build(DiffusionConfig, objective.process, saved, given),
        build(DataConfig, saved, given),
        build(TrainConfig, saved, given),
    )


def _on_device(config: TrainConfig, ranks: Ranks) -> tuple[torch.device, TrainConfig]:
    """The device of this rank, and the settings as they are possible there."""
    device = pick_device(config.device, config.gpu, ranks)
    if config.compile:
        check_compiler(device)
    return device, replace(config, precision=pick_precision(config.precision, device))


def _corpus(
    data_config: DataConfig, condition: str, opt: dict[str, Any] | None, folder: Path, ranks: Ranks
) -> corpora.Corpus:
    """The text, the same on all ranks and, of a run that goes on, the same as before."""
    if data_config.source_len and condition != "source":
        raise UserError("--source_len is about sources, so it expects --condition source, found another")
    corpus = ranks.together(lambda: corpora.load(data_config, folder, condition))
    ranks.agree("training text", {f"the lines of {corpus.source.name}": corpus.fingerprint})
    if opt is not None and opt["fingerprint"] != corpus.fingerprint:
        raise UserError(
            f"{corpus.source}: expected the text that the run in {folder} was started with, found another; "
            "give --checkpoint_path another folder to start a new run"
        )
    return corpus


def occupy(
    folder: Path,
    mirror: Mirror | None,
    corpus: corpora.Corpus,
    config: DataConfig,
    tokenizer: Tokenizer,
    new_file: Path | None,
) -> FolderLock:
    """Take a folder for a run: remove what a killed one left, save the parts of the text and a new tokenizer.

    Raises:
        UserError: it cannot be written to, or another run is at work there.
    """
    check_writable(folder)
    lock = mirror.lock if mirror else FolderLock(folder)
    remove_leftovers(folder)
    remove_stray_shards(folder)
    if corpus.was_split:
        corpus.save_parts(folder)
    if new_file is not None:
        tokenizers.save(tokenizer, new_file)
        print(f"{new_file}: trained a {config.tokenizer} tokenizer", file=sys.stderr)
    return lock


def new_state(run: Run, opt: dict[str, Any] | None = None) -> TrainState:
    """Weights, freshly initialised or a checkpoint's, averages and optimizer, the same on all ranks."""
    torch.manual_seed(mix(run.config.seed, Stream.INIT))
    model = run.network().train()
    model.gradient_checkpointing = run.config.gradient_checkpointing
    if (start := run.start) is not None:  # rank 0's weights go to the others below
        run.ranks.on_first(lambda: start.load_into(model))
    emas = [EMA(model, rate) for rate in run.config.ema_rate]
    if opt is not None:
        source = run.folder / opt["weights"]
        checkpoint.load_state(model, run.ranks.on_first(lambda: _own_weights(source, opt["run"])), source)
        for ema, saved in zip(emas, opt["emas"], strict=True):
            if saved["state"]:  # or in shards
                checkpoint.load_state(ema.model, saved["state"], checkpoint.opt_path(run.folder, opt["step"]))
    synchronise([model, *(ema.model for ema in emas)], run.ranks)
    loss = BatchLoss(model, run.objective, run.diffusion)
    if run.config.parallel == "fsdp" and run.ranks.size > 1:
        shard(loss, run.device, run.ranks)
        for ema in emas:
            shard(ema.model, run.device, run.ranks)
            ema.follow(model)
    sampler = TIMESTEP_SAMPLERS[run.diffusion_config.schedule_sampler](run.diffusion.num_timesteps, run.device)
    by_t = LossByTimestep(run.diffusion.num_timesteps, run.device)
    return TrainState(model, loss, emas, optimizer_of(model, run.config), sampler, by_t)


def _own_weights(source: Path, run: str) -> dict[str, Tensor]:
    weights = checkpoint.read(source)
    if weights.get("run") != run:
        raise UserError(f"{source}: expected the weights of the run in this folder, found another run's")
    state: dict[str, Tensor] = weights["state"]
    return state
