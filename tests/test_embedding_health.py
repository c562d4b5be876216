"""Embeddings' health: its figures against closed forms, healthy after training, and red for a run that collapses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import LINES, SIZES, flags, metrics, write_text

from text_diffusion import embedding_health, losses, train
from text_diffusion.embedding_health import effective_rank, smallest_angle


def test_effective_rank_of_known_spaces() -> None:
    """Of words on the axes, both ways, it is D; of words in a plane, 2, wherever they lie; of two groups, 1."""
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert effective_rank(3 * axes) == pytest.approx(8)
    angles = torch.arange(12) * (2 * math.pi / 12)
    plane = torch.stack([angles.cos(), angles.sin(), *torch.zeros(4, 12)], dim=1)
    assert effective_rank(plane) == pytest.approx(2)
    assert effective_rank(axes[:1].repeat(5, 1) * torch.tensor([[1.0], [-1], [1], [-1], [2]])) == pytest.approx(1)


@pytest.mark.parametrize("rows", [3, 1024])
def test_smallest_angle_by_brute_force(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_health, "ROWS", rows)
    E = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    pairs = [torch.nn.functional.cosine_similarity(E[i], E[j], dim=0) for i in range(10) for j in range(i)]
    assert smallest_angle(E) == pytest.approx(math.degrees(math.acos(float(max(pairs)))), rel=1e-4)


def health(folder: Path, objective: str, steps: int = 200) -> dict[str, float]:
    """The last validation row of a toy run."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("diffusion_steps", "eval_interval")}
    write_text(folder / "corpus.txt", LINES)
    options = {"objective": objective, "dataset": folder / "corpus.txt", "checkpoint_path": folder / objective}
    assert train.main(flags(**sizes | options | {"steps": steps, "lr": 1e-2, "eval_interval": steps})) == 0
    return metrics(folder / objective, validation=True)[-1]


@pytest.mark.parametrize("objective", ["cross_entropy", "diffusion_lm"])
def test_training_keeps_embeddings_healthy(objective: str, tmp_path: Path) -> None:
    """D = 8: words use at least half of the space, and no two are nearer than 10 degrees."""
    row = health(tmp_path, objective)
    assert row["embedding_rank"] > 4
    assert row["embedding_angle"] > 10
    if objective == "cross_entropy":
        assert row["embedding_norm"] == pytest.approx(math.sqrt(8))


def test_a_collapse_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without decoder_nll nothing keeps words apart: mse is least where all embeddings are one."""

    def total(self: losses.Terms, weights: Tensor | float = 1.0) -> Tensor:
        return weights * self.mse

    monkeypatch.setattr(losses.Terms, "total", total)
    row = health(tmp_path, "diffusion_lm", steps=1200)
    assert row["embedding_rank"] < 4
    assert row["embedding_angle"] < 10
