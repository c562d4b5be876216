"""What a training run carries from step to step, saved and restored bit for bit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from text_diffusion import checkpoint
from text_diffusion.checkpoint import opt_path, resumable_steps, state_of, weights_path
from text_diffusion.ema import EMA
from text_diffusion.errors import UserError
from text_diffusion.objectives import Network
from text_diffusion.timesteps import LossByTimestep, TimestepSampler


@dataclass
class TrainState:
    """Everything that changes during training. Random numbers depend on (seed, step) and need no state."""

    model: Network
    emas: list[EMA[Network]]
    optimizer: torch.optim.Optimizer
    timestep_sampler: TimestepSampler
    loss_by_timestep: LossByTimestep
    step: int = 0
    seconds: float = 0.0  # of training, over all the times it was resumed

    def save(self, folder: Path, run: str, about: dict[str, Any], extra: dict[str, Any]) -> list[Path]:
        """Write the checkpoint of this step and return its weights files, the raw one first.

        Args:
            folder: the run's.
            run: the run's identifier; weights files that another run left are not overwritten.
            about: goes into the weights files: settings, tokenizer.
            extra: goes into the opt file besides the state.
        """
        paths: list[Path] = []
        try:
            return self._write(paths, folder, run, about, extra)
        except UserError:
            for path in paths:  # without its opt file a set is nobody's
                path.unlink()
            raise

    def _write(
        self, paths: list[Path], folder: Path, run: str, about: dict[str, Any], extra: dict[str, Any]
    ) -> list[Path]:
        about = about | {"loss_by_timestep": self.loss_by_timestep.means()}
        for rate, model in [(None, self.model), *((ema.rate, ema.model) for ema in self.emas)]:
            path = _not_foreign(weights_path(folder, self.step, rate), run)
            contents = {"run": run, "step": self.step, "ema_rate": rate, "state": state_of(model)}
            checkpoint.write(path, contents | about)
            paths.append(path)
        contents = {
            "run": run,
            "step": self.step,
            "seconds": self.seconds,
            "weights": paths[0].name,
            "optimizer": self.optimizer.state_dict(),
            "emas": [{"rate": e.rate, "updates": e.updates, "state": state_of(e.model)} for e in self.emas],
            "timestep_sampler": self.timestep_sampler.state_dict(),
            "loss_by_timestep": self.loss_by_timestep.state_dict(),
        }
        checkpoint.write(opt_path(folder, self.step), contents | extra)
        return paths

    def restore(self, folder: Path, opt: dict[str, Any]) -> None:
        """Take back what `save` wrote; `opt` is the contents of the opt file.

        Raises:
            UserError: the weights file is missing, truncated, of another run, or does not fit.
        """
        source = folder / opt["weights"]
        weights = checkpoint.read(source)
        if weights.get("run") != opt["run"]:
            raise UserError(f"{source}: expected the weights of the run in this folder, found another run's")
        checkpoint.load_state(self.model, weights["state"], source)
        self.optimizer.load_state_dict(opt["optimizer"])
        for ema, saved in zip(self.emas, opt["emas"], strict=True):
            checkpoint.load_state(ema.model, saved["state"], opt_path(folder, opt["step"]))
            ema.updates = saved["updates"]
        self.timestep_sampler.load_state_dict(opt["timestep_sampler"])
        self.loss_by_timestep.load_state_dict(opt["loss_by_timestep"])
        self.step, self.seconds = opt["step"], opt["seconds"]


def find_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The contents of the newest opt file that is whole, with a line about each that is not; None without any.

    Raises:
        UserError: there are opt files and not one is whole.
    """
    problems = []
    for step in resumable_steps(folder):
        path = opt_path(folder, step)
        try:
            opt = checkpoint.read(path)
            if "optimizer" not in opt:
                raise UserError(f"{path}: expected an opt file, found something else")
            checkpoint.read(folder / opt["weights"])
            return opt
        except UserError as error:
            problems.append(str(error))
            print(f"warning: passed over: {error}", file=sys.stderr)
    if problems:
        raise UserError(f"{folder}: expected a whole checkpoint to go on from, found none: {problems[0]}")
    return None


def _not_foreign(path: Path, run: str) -> Path:
    """`path`, or a name beside it when another run's weights (the shipped ones, say) are there."""
    if not path.is_file():
        return path
    try:
        if checkpoint.read(path).get("run") == run:
            return path
    except UserError:
        pass
    other = _not_foreign(path.with_name(f"{path.stem}.new.pt"), run)
    print(f"{path.name} belongs to another run and stays; written to {other.name} instead", file=sys.stderr)
    return other
