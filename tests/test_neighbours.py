"""What stands next to a word: term by term, left to right where the network is causal, and in which networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import SIZES, flags

from text_diffusion import train
from text_diffusion.config import ModelConfig
from text_diffusion.muon import matrices
from text_diffusion.neighbours import Neighbours
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.run import prepare

B, H, V = 2, 8, 10


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L", [1, 2, 7])  # shorter than it reaches, and longer
@torch.no_grad()
def test_term_by_term(L: int, causal: bool) -> None:
    torch.manual_seed(0)
    layer = Neighbours(H, 3, causal)
    torch.nn.init.normal_(layer.linear.bias)
    shifts = [-3, -2, -1] if causal else [-3, -2, -1, 1, 2, 3]
    W = dict(zip(shifts, layer.linear.weight.view(H, len(shifts), H).unbind(dim=1), strict=True))
    h = torch.randn(B, L, H)
    expected = (h + layer.linear.bias).numpy()
    for b, i, k in np.ndindex(B, L, L):
        if k - i in W:
            expected[b, i] += W[k - i].numpy() @ h[b, k].numpy()
    assert layer(h).numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("denoiser", ["bert", "modern"])
def test_a_causal_network_stays_causal(denoiser: str) -> None:
    """With a word changed, scores before it are the same; its own and those of the two words after it are not."""
    torch.manual_seed(0)
    config = ModelConfig(objective="autoregressive", denoiser=denoiser, hidden_size=H, num_heads=2, neighbours=2)
    model = OBJECTIVES["autoregressive"].network(config, V, 9).eval()
    ids = torch.randint(V, (B, 9))
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % V
    with torch.no_grad():
        changed = (model(ids) - model(other)).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.tolist()[:8] == [False] * 5 + [True] * 3


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_every_objective_can_have_them(objective: str) -> None:
    """Their matrix is one that Muon is for."""
    config = ModelConfig(objective=objective, hidden_size=H, num_heads=2, neighbours=1)
    model = OBJECTIVES[objective].network(config, V, 9)
    assert any(W is model.neighbours.linear.weight for W in matrices(model))


def started(corpus: Path, folder: Path, **options: Any) -> ModelConfig:
    """What a run is like that begins, or goes on, with these flags."""
    sizes = {name: value for name, value in SIZES.items() if name not in ("diffusion_steps", "num_channels")}
    run, state = prepare(train.parse(flags(dataset=corpus, checkpoint_path=folder, **sizes | options)))
    assert run.lock is not None
    run.lock.release()
    assert hasattr(state.model, "neighbours") == (run.model_config.neighbours > 0)
    return run.model_config


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_words_beside_unless_it_is_the_inherited_network(objective: str, corpus: Path, tmp_path: Path) -> None:
    assert started(corpus, tmp_path / "a", objective=objective).neighbours == (0 if objective == "diffusion_lm" else 2)
    assert started(corpus, tmp_path / "b", objective=objective, neighbours=1).neighbours == 1


def test_a_run_from_before_goes_on_without(corpus: Path, tmp_path: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "diffusion_steps"}
    beginning = flags(dataset=corpus, checkpoint_path=tmp_path, objective="cross_entropy", steps=2, **sizes)
    assert train.main([*beginning, "--neighbours", "0"]) == 0
    path = tmp_path / "opt000002.pt"
    saved = torch.load(path, weights_only=True)
    del saved["settings"]["model"]["neighbours"]
    torch.save(saved, path)
    assert started(corpus, tmp_path, steps=3).neighbours == 0
