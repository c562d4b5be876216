"""The steps of Muon against the singular value decomposition, PyTorch's own Muon and AdamW; in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toy import Trained, same, weights_of

from text_diffusion.config import ModelConfig
from text_diffusion.muon import Muon, matrices, orthogonal
from text_diffusion.objectives import OBJECTIVES


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5)])
def test_singular_values_become_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(3, *shape, generator=generator)
    P, _, Qh = torch.linalg.svd(U, full_matrices=False)
    turned = P.mT @ orthogonal(U) @ Qh.mT
    sizes = turned.diagonal(dim1=1, dim2=2)
    assert ((sizes > 0.4) & (sizes < 1.3)).all()
    assert torch.allclose(turned, torch.diag_embed(sizes), atol=1e-4)
    assert torch.allclose(orthogonal(1000 * U), orthogonal(U), atol=1e-4)


def twins(*shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The same parameters twice."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    return ours, theirs


def test_steps_are_those_of_pytorch() -> None:
    shapes = [(8, 24), (8, 24), (24, 8), (16,), (20, 8)]  # the last two are AdamW's
    ours, theirs = twins(*shapes)
    before = [parameter.detach().clone() for parameter in ours]
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    muon = Muon(ours, ours[:3], **options)
    references: list[torch.optim.Optimizer] = [
        torch.optim.Muon(theirs[:3], adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(theirs[3:], **options),
    ]
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        kept = [parameter.grad for parameter in ours]
        muon.step()
        assert all(parameter.grad is grad for parameter, grad in zip(ours, kept, strict=True))
        for reference in references:
            reference.step()
    for mine, other, first in zip(ours[:3], theirs[:3], before[:3], strict=True):
        assert (mine - other).norm() < 0.02 * (other - first).norm()  # theirs is computed in bf16
    assert all(torch.equal(mine, other) for mine, other in zip(ours[3:], theirs[3:], strict=True))


def test_what_is_frozen_or_has_no_gradient_stays() -> None:
    ours, before = twins((8, 8), (8, 8))
    ours[1].grad = torch.ones(8, 8)
    Muon(ours, ours, lr=0.1).step()
    assert torch.equal(ours[0], before[0])
    assert not torch.equal(ours[1], before[1])


@pytest.mark.parametrize("denoiser", ["bert", "modern"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_it_is_for_weights_of_linear_layers_alone(name: str, denoiser: str) -> None:
    config = ModelConfig(objective=name, denoiser=denoiser, hidden_size=16, num_heads=2, in_channel=8, num_channels=8)
    model = OBJECTIVES[name].network(config, vocab_size=20, sequence_len=6)
    found = {id(weight) for weight in matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert "word_embedding.weight" not in names
    assert {"input_up_proj.0.weight", "output_down_proj.2.weight"} <= names
    assert any(name.startswith("layers.1.") for name in names)
    assert not {name for name in names if "norm" in name.lower() or "position" in name or name.endswith("bias")}


def test_run_goes_on_bit_for_bit(go: Trained) -> None:
    once = go("once", steps=8)
    twice = go("twice", steps=8, save_interval=5)
    for file in twice.glob("*000008*"):
        file.unlink()
    go("twice", steps=8, save_interval=5)
    assert same(weights_of(once, "model000008.pt"), weights_of(twice, "model000008.pt"))
    assert not same(
        weights_of(once, "model000008.pt"), weights_of(go("adamw", steps=8, optimizer="adamw"), "model000008.pt")
    )
