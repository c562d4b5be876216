"""Means of a training run's figures between two rows of its log, without waiting for the device at every step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from text_diffusion.errors import UserError
from text_diffusion.run import Run
from text_diffusion.state import TrainState
from text_diffusion.tracking import Row


class Meter:
    """Means of the loss terms since the last row, kept on the device until a row is asked for."""

    def __init__(self, run: Run) -> None:
        self.batch_size, self.diffusion_steps = run.config.batch_size, run.diffusion.num_timesteps
        self.by_t, self.world_size = run.objective.by_t, run.ranks.size
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.seconds = 0.0
        self.by_quarter = torch.zeros(2, 4, device=run.device)  # sums and counts of it in each quarter of 0..T-1
        self.first_bad = torch.full((), -1, device=run.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What happened since the last step was not training."""
        self.clock = time.perf_counter()

    def add(self, values: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Take in what a training step returned."""
        t = values.pop("t")
        means = {name: value.mean() for name, value in values.items()} | {"grad_norm": grad_norm}
        self.sums = {name: mean + self.sums.get(name, 0) for name, mean in means.items()}
        if self.by_t:
            value, quarter = values[self.by_t], t * 4 // self.diffusion_steps
            self.by_quarter.index_add_(1, quarter, torch.stack([value, torch.ones_like(value)]))
        bad = ~torch.isfinite(grad_norm + means["loss"]) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, self.steps, self.first_bad)
        self.steps += 1
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def spoil(self) -> None:
        """The loss of the step to come is not finite: these weights are no checkpoint."""
        self.first_bad = torch.where(self.first_bad < 0, self.steps, self.first_bad)

    def check(self, state: TrainState) -> None:
        """Look whether all was finite; waits for the device, so it is done before rows and checkpoints only.

        Raises:
            UserError: a loss or a gradient was not finite.
        """
        if int(self.first_bad) >= 0:
            step = state.step - self.steps + int(self.first_bad) + 1
            raise UserError(
                f"expected a finite loss and gradient, found one that is not at step {step}; checkpoints before it are "
                "whole: run again with a lower --lr, in a new --checkpoint_path if it has gone wrong for long"
            )

    def row(self, state: TrainState) -> Row:
        """A row of means, and start again; raises as `check` does."""
        self.check(state)
        state.seconds += self.seconds
        row: Row = {"step": state.step}
        row |= {name: float(total) / self.steps for name, total in self.sums.items()}
        sums, counts = self.by_quarter.tolist()
        row |= {f"{self.by_t}_q{i + 1}": s / c for i, (s, c) in enumerate(zip(sums, counts, strict=True)) if c}
        row |= {
            "lr": state.optimizer.param_groups[0]["lr"],
            "sentences_per_s": self.steps * self.batch_size / max(self.seconds, 1e-9),
            "seconds": state.seconds,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
        }
        self.sums, self.steps, self.seconds = {}, 0, 0.0
        self.by_quarter.zero_()
        return row

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last row: a run that is stopped between two rows goes on with the same log."""
        sums = {name: total.detach().cpu() for name, total in self.sums.items()}
        return {"sums": sums, "by_quarter": self.by_quarter.cpu(), "steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.sums = {name: total.to(self.by_quarter.device) for name, total in saved["sums"].items()}
        self.by_quarter.copy_(saved["by_quarter"])
        self.steps, self.seconds = saved["steps"], saved["seconds"]
