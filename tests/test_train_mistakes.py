"""Mistakes in the settings of a run are found before the work, loggers outside are extras."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import (
    COPIED,
    FakeWandb,
    Trained,
    files,
    flags,
    metrics,
    one_sentence,
    train_flags,
    weights_of,
)

import text_diffusion
from text_diffusion import pretrained, train
from text_diffusion.config import ModelConfig, TrainConfig
from text_diffusion.flags import build
from text_diffusion.tracking import clock


def test_loss_that_is_not_finite(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate ruins the weights in step 7; the loss of step 8 shows it. What was good stays, to go on from."""
    before = {name: content for name, content in files(copied).items() if name.endswith(".pt")}
    go(status=1, **COPIED | {"steps": 20, "lr": 1e30, "log_interval": 50, "save_interval": 4, "eval_interval": 0})
    error = one_sentence(capsys.readouterr().err)
    assert "expected a finite loss and gradient, found one that is not at step 8;" in error
    assert "lower --lr" in error
    assert {name: content for name, content in files(copied).items() if name.endswith(".pt")} == before
    assert text_diffusion.load(str(copied / "ema_0.9_000006.pt")).sample(2)
    go(**COPIED | {"steps": 20})
    assert "going on from step 6" in capsys.readouterr().err
    assert all(math.isfinite(row["loss"]) for row in metrics(copied))


def test_ruined_weights_are_no_checkpoint(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 7 ruins them and its own loss does not show it: they are neither saved nor in the place of good ones."""
    before = {name: content for name, content in files(copied).items() if name.startswith("opt")}
    options = {"steps": 20, "lr": 1e30, "log_interval": 50, "save_interval": 1, "keep_last": 1, "eval_interval": 0}
    go(status=1, **COPIED | options)
    assert "found one that is not at step 8; checkpoints before it are whole" in one_sentence(capsys.readouterr().err)
    assert {name: content for name, content in files(copied).items() if name.startswith("opt")} == before
    go(**COPIED | options | {"lr": 1e-3, "save_interval": 3})
    assert "going on from step 6" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_unwritable_folder_is_found_before_the_work(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("the work began"))
    assert train.main(train_flags(corpus, tmp_path / name)) == 1
    assert f"{tmp_path / name}: expected a folder to write to" in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == {"file": b""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 15}, "--hidden_size must be a multiple of --num_heads (2), found 15"),
        ({"microbatch": 3}, "must be even (every second sentence is self-conditioned), found 3"),
        ({"sequence_len": 2}, "--sequence_len must be at least 3"),
        ({"sequence_len": 5, "long_lines": "error"}, "76 of 76 sentences are longer than --sequence_len 5"),
        ({"sequence_len": 5, "long_lines": "drop"}, "expected sentences of at most 5 tokens, found only longer ones"),
        ({"device": "mps"}, "--device mps expects such a device, found none"),
        ({"tokenizer": "none.json"}, "none.json: expected a tokenizer's JSON file"),
        ({"train_txt_path": "none.txt"}, "none.txt: expected a text file"),
        ({"val_txt_path": "none.txt"}, "none.txt: expected a text file"),
        ({"init_pretrained": True}, "--init_pretrained expects --pretrained_model FOLDER"),
        ({"freeze_embeddings": True}, "it expects --pretrained_embeddings True"),
        ({"size": "huge"}, "argument --size: invalid choice: 'huge'"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_written(
    options: dict[str, object], message: str, go: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(status=1, **options)
    assert message in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == {}


# Torch's compiler, and loggers outside


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled_network_is_used(go: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch's front end, with nothing generated: the same weights, the file's names without a prefix."""
    plain = weights_of(go("plain", steps=3))
    traced = []
    whole = torch.compile

    def compile_lightly(model: torch.nn.Module, **options: Any) -> Any:
        traced.append(model)
        return whole(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_lightly)
    monkeypatch.setenv("CXX", sys.executable)  # it is there, and not asked for anything
    compiled = weights_of(go("compiled", steps=3, compile=True))
    assert len(traced) == 1
    torch._dynamo.reset()
    assert compiled.keys() == plain.keys()
    for name, state in compiled.items():
        for key, weight in state.items():
            torch.testing.assert_close(weight, plain[name][key], rtol=0, atol=1e-6)


def test_no_compiler(
    go: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    go(status=1, compile=True)
    assert "expects a C++ compiler, found no no-such-compiler" in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiler(go: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = {"steps": 2, "hidden_size": 8, "num_heads": 1, "self_condition": False}
    plain, compiled = (weights_of(go(str(compile), compile=compile, **options)) for compile in (False, True))
    torch._dynamo.reset()
    for name, state in compiled.items():
        for key, weight in state.items():
            torch.testing.assert_close(weight, plain[name][key], rtol=0, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard(go: Trained) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = go(steps=4, log_interval=2, eval_interval=4, track="tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(row["step"], pytest.approx(row["loss"])) for row in metrics(folder)]
    assert [event.step for event in events.Scalars("val_loss")] == [4]


def test_wandb(go: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = go(steps=4, log_interval=2, eval_interval=4, track="wandb")
    assert fake.finished
    assert fake.given["config"]["train"]["steps"] == 4
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **row} for step, row in fake.rows] == rows


@pytest.mark.parametrize(("track", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_loggers_outside_are_extras(
    track: str, module: str, go: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    go(status=1, steps=2, track=track)
    error = one_sentence(capsys.readouterr().err)
    assert error == f"error: --track {track} needs a library that is not there: pip install {track}"


def test_missing_extra_is_found_first(
    go: Trained, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = files(copied)
    opened: list[Path] = []
    path_open = Path.open

    def spied(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return path_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", spied)
    go(status=1, **COPIED | {"steps": 8, "track": "wandb"})
    one_sentence(capsys.readouterr().err)
    assert copied / "metrics.jsonl" not in opened
    after = files(copied)
    del before["training_args.json"], after["training_args.json"]  # printed before, with the number of parameters
    assert after == before


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.9, "00:59"), (61, "01:01"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# The settings


def test_settings_are_saved(trained: Path) -> None:
    saved = json.loads((trained / "training_args.json").read_text())
    assert list(saved) == ["model", "diffusion", "data", "train"]
    assert saved["model"]["hidden_size"] == 16
    assert saved["data"]["sequence_len"] == 8
    assert saved["train"]["ema_rate"] == [0.9]


def test_sizes(corpus: Path) -> None:
    """A named size stands for several flags; a single flag beats it, wherever it stands."""
    base = train.parse(["--size", "base"])
    assert (base["hidden_size"], base["num_layers"], base["lr"]) == (768, 12, 1e-4)
    for argv in (["--size", "base", "--num_layers", "2"], ["--num_layers", "2", "--size", "base"]):
        assert train.parse(argv) == base | {"num_layers": 2}
    small = train.parse(["--size", "small"])
    assert small.keys() == base.keys() - {"in_channel"}  # which is the objective's
    assert build(ModelConfig, small) == ModelConfig()
    assert build(TrainConfig, small) == TrainConfig()


def test_named_size_contradicts_another(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The copied run is of neither size."""
    assert train.main(flags(checkpoint_path=copied, steps=8, size="base")) == 1
    assert "was started with --" in one_sentence(capsys.readouterr().err)
    assert train.main(flags(checkpoint_path=copied, steps=8, size="small")) == 1
    assert "was started with --" in one_sentence(capsys.readouterr().err)


def test_original_s_positions_pass_through() -> None:
    positions = flags(init_pretrained=False, pretrained_embeddings="false", freeze_embeddings="False")
    assert train.parse(positions) == dict.fromkeys(pretrained.FLAGS[1:], False)
