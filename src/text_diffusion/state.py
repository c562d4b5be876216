"""What a training run carries from step to step, saved and restored bit for bit."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_diffusion.checkpoint import state_of
from text_diffusion.distributed import Ranks
from text_diffusion.ema import EMA
from text_diffusion.loss_by_timestep import LossByTimestep
from text_diffusion.muon import moments
from text_diffusion.objectives import Network
from text_diffusion.parallel import BatchLoss, is_sharded, sharded_like
from text_diffusion.snapshot import Snapshot, frozen, read_shards
from text_diffusion.timesteps import TimestepSampler


@dataclass
class TrainState:
    """Everything that changes during training. Random numbers depend on (seed, step) and need no state."""

    model: Network
    loss: BatchLoss
    emas: list[EMA[Network]]
    optimizer: torch.optim.Optimizer
    timestep_sampler: TimestepSampler
    loss_by_timestep: LossByTimestep
    step: int = 0
    seconds: float = 0.0  # of training, over all the times it was resumed

    def snapshot(self, ranks: Ranks, run: str, about: dict[str, Any], extra: dict[str, Any]) -> Snapshot:
        """The checkpoint of this step; every rank takes one at once.

        Args:
            ranks: rank 0's holds what is not sharded.
            run: the run's identifier.
            about: goes into the weights files: settings, tokenizer.
            extra: goes into the opt file besides the state.
        """
        sharded = is_sharded(self.model)
        if not (ranks.first or sharded):
            return Snapshot(run, self.step, [], {}, {})
        mark = {"snapshot": uuid.uuid4().hex}  # a step may be reached twice: what belongs together says so
        about = about | {"loss_by_timestep": self.loss_by_timestep.means()} | mark
        weights = []
        for rate, model in [(None, self.model), *((ema.rate, ema.model) for ema in self.emas)]:
            state = state_of(model)  # put together from its shards by all ranks, if need be
            contents = {"run": run, "step": self.step, "ema_rate": rate, "state": state}
            weights += [(rate, contents | about)] if ranks.first else []
        opt = {
            "run": run,
            "step": self.step,
            "seconds": self.seconds,
            "optimizer": {} if sharded else self.optimizer.state_dict(),
            "timestep_sampler": self.timestep_sampler.state_dict(),
            "loss_by_timestep": self.loss_by_timestep.state_dict(),
        }
        if ranks.first:
            opt = frozen(opt | mark | extra)
            opt["emas"] = [  # the copies that go into the weights files too
                {"rate": ema.rate, "updates": ema.updates, "state": {} if sharded else contents["state"]}
                for ema, (_, contents) in zip(self.emas, weights[1:], strict=True)
            ]
        shards = {name: tensor.detach().clone() for name, tensor in self._shards().items()} if sharded else {}
        return Snapshot(run, self.step, weights, opt if ranks.first else {}, shards)

    def restore(self, folder: Path, opt: dict[str, Any]) -> None:
        """Take back what a snapshot kept, but for the weights, which `new_state` begins with.

        Raises:
            UserError: shards are missing or damaged.
        """
        if opt.get("shards"):
            self._make_moments()
            read_shards(folder / opt["shards"], self._shards())
        else:
            optimizer = opt["optimizer"]
            parameters = self.optimizer.param_groups[0]["params"]
            for i, state in optimizer["state"].items():
                state |= {name: sharded_like(parameters[i], value) for name, value in state.items() if name != "step"}
            self.optimizer.load_state_dict(optimizer)
        for ema, saved in zip(self.emas, opt["emas"], strict=True):
            ema.updates = saved["updates"]
        self.timestep_sampler.load_state_dict(opt["timestep_sampler"])
        self.loss_by_timestep.load_state_dict(opt["loss_by_timestep"])
        self.step, self.seconds = opt["step"], opt["seconds"]

    def _shards(self) -> dict[str, Tensor]:
        """What is sharded, by the same names whatever the number of ranks: moments and averages."""
        found = {}
        for i, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            for name, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{i}.{name}"] = value
        for ema in self.emas:
            found |= {f"ema_{ema.rate}.{i}": parameter for i, parameter in enumerate(ema.model.parameters())}
        return found

    def _make_moments(self) -> None:
        """An optimizer that has made no step has none."""
        for parameter in self.optimizer.param_groups[0]["params"]:
            state = self.optimizer.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in moments(self.optimizer, parameter)}
