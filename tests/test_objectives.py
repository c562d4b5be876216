"""Which objective a run has, and which settings follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import contents, flags, one_sentence

from text_diffusion import train
from text_diffusion.config import DiffusionConfig, ModelConfig
from text_diffusion.objectives import OBJECTIVES, implied
from text_diffusion.run import prepare

SIZES: dict[str, Any] = {"batch_size": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "eval_interval": 0}
ITS_PROCESS = {
    "diffusion_lm": DiffusionConfig(2000, "sqrt", "uniform", False),
    "cross_entropy": DiffusionConfig(10_000, "log-snr", "fitted", True),
    "masked": DiffusionConfig(10_000, "log-snr", "uniform", True),
    "autoregressive": DiffusionConfig(10_000, "log-snr", "uniform", False),
}


def started(corpus: Path, folder: Path, **options: Any) -> tuple[ModelConfig, DiffusionConfig]:
    """The settings of a run that begins with these flags."""
    run, _ = prepare(train.parse(flags(dataset=corpus, checkpoint_path=folder, **SIZES | options)))
    assert run.lock is not None
    run.lock.release()
    return run.model_config, run.diffusion_config


def test_the_table_of_defaults_is_that_of_the_default_objective(corpus: Path, tmp_path: Path) -> None:
    model, process = started(corpus, tmp_path)
    assert (model.objective, model.in_channel, model.neighbours) == ("cross_entropy", 64, 2)
    assert model == ModelConfig(hidden_size=16, num_layers=1, num_heads=2)
    assert process == DiffusionConfig() == ITS_PROCESS["cross_entropy"]


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_settings_that_follow(objective: str, corpus: Path, tmp_path: Path) -> None:
    model, process = started(corpus, tmp_path, objective=objective)
    assert (model.objective, process) == (objective, ITS_PROCESS[objective])
    assert model.in_channel == (64 if objective == "cross_entropy" else 32)


@pytest.mark.parametrize(
    ("given", "objective"),
    [
        ({}, "cross_entropy"),
        ({"lr", "in_channel", "self_condition"}, "cross_entropy"),
        ({"diffusion_steps"}, "diffusion_lm"),
        ({"noise_schedule", "lr"}, "diffusion_lm"),
        ({"output_scale"}, "cross_entropy"),
        ({"output_scale", "noise_schedule"}, "cross_entropy"),  # of neither; refused then
    ],
)
def test_flags_choose_an_objective_that_has_them(given: set[str], objective: str) -> None:
    assert implied(given) == objective


def test_the_command_of_the_original(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags mean its objective; the run goes on with them, and without."""
    usual = {"dataset": corpus, "checkpoint_path": tmp_path / "run", **SIZES}
    its = {"diffusion_steps": 50, "noise_schedule": "cosine"}
    assert train.main(flags(**usual, **its, steps=1)) == 0
    assert ", --objective diffusion_lm; settings in" in capsys.readouterr().err
    assert train.main(flags(**usual, **its, steps=2)) == 0
    assert train.main(flags(**usual, steps=3)) == 0
    saved = contents(tmp_path / "run" / "model000003.pt")
    assert saved["model"]["objective"] == "diffusion_lm"
    assert saved["diffusion"] == {**its, "schedule_sampler": "uniform", "stratified": False}


def test_a_run_does_not_change_its_objective_by_a_flag(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"dataset": corpus, "checkpoint_path": tmp_path / "run", **SIZES}
    assert train.main(flags(**usual, steps=1)) == 0
    capsys.readouterr()
    assert train.main(flags(**usual, steps=2, diffusion_steps=50)) == 1
    expected = "was started with --diffusion_steps 10000 of --objective cross_entropy, found 50"
    assert expected in one_sentence(capsys.readouterr().err)


def test_flags_of_two_objectives(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = {"dataset": corpus, "checkpoint_path": tmp_path / "run", **SIZES}
    assert train.main(flags(**usual, diffusion_steps=50, output_scale=2)) == 1
    found = one_sentence(capsys.readouterr().err)
    assert "--diffusion_steps belongs to another objective: leave it out with --objective cross_entropy" in found
    assert "or take --objective diffusion_lm" in found
    assert not (tmp_path / "run").exists()


def test_a_named_size_leaves_d_to_the_objective(corpus: Path, tmp_path: Path) -> None:
    sizes = {"size": "small", "batch_size": 8}
    assert started(corpus, tmp_path / "words", **sizes)[0].in_channel == 64
    assert started(corpus, tmp_path / "lm", **sizes, objective="diffusion_lm")[0].in_channel == 32
