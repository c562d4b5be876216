"""Exponential moving averages of the weights, with warm-up."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from text_diffusion.parallel import local

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A copy of a model whose weights follow the model's: ema <- d ema + (1 - d) w, d = min(rate, (1 + n) / (10 + n)).

    The warm-up (n: updates so far) keeps the random initial weights from lingering: without it 61 % of them would
    still be there after 5,000 steps at a rate of 0.9999. A tied weight is one weight here too.
    """

    def __init__(self, model: M, rate: float) -> None:
        self.rate = rate
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.follow(model)

    def follow(self, model: M) -> None:
        """Look at the weights where they are now: sharding moves them."""
        self._averages: list[Tensor] = [local(average) for average in self.model.parameters()]
        self._weights: list[Tensor] = [local(weight) for weight in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        decay = min(self.rate, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self.updates += 1
