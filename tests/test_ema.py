"""Averages of weights against their recursion in NumPy, and what is left of the random start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from text_diffusion.config import ModelConfig
from text_diffusion.ema import EMA
from text_diffusion.modeling import TransformerNetModel


def one_weight(value: float) -> nn.Linear:
    """A model of a single number."""
    model = nn.Linear(1, 1, bias=False)
    set_weight(model, value)
    return model


def set_weight(model: nn.Linear, value: float | Tensor) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(value))


def average(ema: EMA[torch.nn.Linear]) -> float:
    return float(next(ema.model.parameters()))


def decay(rate: float, n: int) -> float:
    return min(rate, (1 + n) / (10 + n))


def network() -> TransformerNetModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"in_channel": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_channels": 4}
    return TransformerNetModel(ModelConfig(**sizes), 7, 5)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("updates", [1, 2, 9, 100])
def test_constant_weights(rate: float, updates: int) -> None:
    """ema - weight shrinks by the product of the decays."""
    model = one_weight(5.0)
    ema = EMA(model, rate)
    set_weight(model, 2.0)
    for _ in range(updates):
        ema.update()
    expected = 2 + 3 * math.prod(decay(rate, n) for n in range(updates))
    assert average(ema) == pytest.approx(expected, rel=1e-5)
    assert ema.updates == updates


@pytest.mark.parametrize("rate", [0.5, 0.99, 0.9999])
def test_arbitrary_weights(rate: float) -> None:
    """Each entry of each weight follows ema <- d ema + (1 - d) weight."""
    model = network()
    ema = EMA(model, rate)
    expected = [p.detach().double().numpy().copy() for p in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    for n in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        ema.update()
        d = decay(rate, n)
        weights = [p.detach().double().numpy() for p in model.parameters()]
        expected = [d * e + (1 - d) * w for e, w in zip(expected, weights, strict=True)]
    for ours, theirs in zip(ema.model.parameters(), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rate", "most"), [(0.9999, 1e-26), (0.999, 1e-26), (0.99, 1e-20)])
def test_random_start_is_forgotten(rate: float, most: float) -> None:
    """After 5,000 updates the initial weights have next to no weight; without warm-up 0.9999^5000 = 61 % of them."""
    model = one_weight(1.0)
    ema = EMA(model, rate)
    set_weight(model, 0.0)
    for _ in range(5000):
        ema.update()
    assert 0 <= average(ema) < most


def test_late_averages_reach_far_back() -> None:
    """Warm-up is over when (1 + n) / (10 + n) passes the rate: from then on the rate itself is the decay."""
    model = one_weight(0.0)
    ema = EMA(model, 0.99)
    for _ in range(2000):
        ema.update()
    set_weight(model, 1.0)
    ema.update()
    assert average(ema) == pytest.approx(0.01, rel=1e-4)


def test_rate_0_copies() -> None:
    model = network()
    ema = EMA(model, 0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7).add_(0.1)
    ema.update()
    for ours, theirs in zip(ema.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_tied_weights_stay_tied() -> None:
    """One weight in the model is one average, updated once."""
    model = network()
    ema = EMA(model, 0.9)
    averaged = ema.model
    assert isinstance(averaged, TransformerNetModel)
    before = averaged.word_embedding.weight.clone()
    with torch.no_grad():
        model.word_embedding.weight.add_(1.0)
    ema.update()
    assert averaged.lm_head.weight is averaged.word_embedding.weight
    torch.testing.assert_close(averaged.word_embedding.weight, before + 0.9)  # d = 1 / 10 at first
    assert len(list(averaged.parameters())) == len(list(model.parameters()))


def test_the_average_is_a_model_apart() -> None:
    """In eval mode, without gradients, and taking it does not touch the model."""
    model = network().train()
    before = [p.detach().clone() for p in model.parameters()]
    ema = EMA(model, 0.9)
    with torch.no_grad():
        next(iter(ema.model.parameters())).add_(1.0)
    ema.update()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in ema.model.modules())
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_optimizer_steps_are_followed() -> None:
    """The average sees weights that an optimizer changes in place, and those that are loaded into the model."""
    model = one_weight(1.0)
    ema = EMA(model, 0.0)
    model(torch.ones(1, 1)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    ema.update()
    assert average(ema) == 0.5
    model.load_state_dict({"weight": torch.tensor([[3.0]])})
    ema.update()
    assert average(ema) == 3.0
