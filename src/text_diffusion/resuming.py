"""Going on with a run that was stopped: its settings, which must be the same, and its state."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text_diffusion import corpus as corpora
from text_diffusion import tokenizer as tokenizers
from text_diffusion.checkpoint import resumable_steps
from text_diffusion.config import ONCE, DiffusionConfig, ModelConfig
from text_diffusion.distributed import Ranks
from text_diffusion.errors import UserError
from text_diffusion.lock import FolderLock

if TYPE_CHECKING:
    from text_diffusion.run import Run
    from text_diffusion.state import TrainState

# Settings that a run keeps for life: with another value it would not be the same run.
FIXED = {
    *ModelConfig.__dataclass_fields__,
    *DiffusionConfig.__dataclass_fields__,
    *("tokenizer", "sequence_len", "source_len", "long_lines", "batch_size", "seed", "ema_rate", "optimizer"),
    *("pairs", "teacher_levels"),
}


def saved_settings(opt: dict[str, Any] | None, given: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The settings of the run that goes on, where older ones do not say all, none contradicted; none of a new one."""
    if opt is None:
        return {}
    saved = dict(ONCE)
    for group in opt["settings"].values():
        saved |= group
    check_same_run(given, saved, folder)
    named: str = given.get("tokenizer", saved["tokenizer"])
    ranks.on_first(lambda: corpora.check_same_tokenizer(named, opt["tokenizer"], saved["tokenizer"]))
    saved.pop("checkpoint_path", None)
    return saved


def resume(run: Run, state: TrainState, opt: dict[str, Any], saved: dict[str, Any]) -> None:
    """Restore the state of a run that was stopped, and say so.

    Raises:
        UserError: the run is already further than STEPS.
    """
    run.ranks.together(lambda: state.restore(run.folder, opt))
    for group in state.optimizer.param_groups:
        group["weight_decay"] = run.config.weight_decay  # may change; the learning rate is set at every step
    steps = run.config.steps
    if state.step > steps:
        raise UserError(f"STEPS must be at least {state.step}, where the run in {run.folder} is, found {steps}")
    print(f"going on from step {state.step} of the run in {run.folder}", file=sys.stderr)
    before, now = opt.get("world_size", run.ranks.size), run.ranks.size
    if before != now or (now > 1 and saved.get("parallel", run.config.parallel) != run.config.parallel):
        print(
            f"it ran on {_shared(before, saved.get('parallel'))} and goes on with {_shared(now, run.config.parallel)}: "
            "the same data in the same order, but sums of floats in another, so no longer equal to the last bit",
            file=sys.stderr,
        )
    if steps != saved["steps"]:
        is_known = run.model_config.objective == "cross_entropy" and run.model_config.known_words
        also = " and the share of known words" if is_known else ""
        print(f"STEPS was {saved['steps']} and is {steps}: the learning-rate schedule{also} changed", file=sys.stderr)


def _shared(ranks: int, parallel: object) -> str:
    return "one process" if ranks == 1 else f"{ranks} processes ({parallel})"


def check_same_run(given: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Refuse settings that the run in the folder was not started with.

    Raises:
        UserError: naming the first of them.
    """
    for name in sorted(FIXED & given.keys()):
        if name == "tokenizer" and given[name] not in tokenizers.KINDS:
            continue  # a file, whose contents count: `check_same_tokenizer`
        if given[name] != saved[name] and not (name in ("sequence_len", "source_len") and given[name] == 0):
            of = f" of --objective {saved['objective']}" if name in ("diffusion_steps", "noise_schedule") else ""
            raise UserError(
                f"the run in {folder} was started with --{name} {saved[name]}{of}, found {given[name]}; "
                "give --checkpoint_path another folder to start a new run"
            )


def check_unchanged(folder: Path, there: list[int], lock: FolderLock) -> None:
    """Find out, now that nobody else can write, whether somebody has since the folder was looked into.

    Raises:
        UserError: its checkpoints are not those that were there; the lock is released.
    """
    if resumable_steps(folder) != there:
        lock.release()
        raise UserError(
            f"{folder}: expected nobody else to write here, found a checkpoint that came or went while this run "
            "began; run the same command again to go on from the newest"
        )
