"""What one step of training does, and what validation shows."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import (
    HAS_BF16,
    LINES,
    Trained,
    contents,
    everything,
    metrics,
    same,
    train_flags,
    weights_of,
    write_text,
)

import text_diffusion
from text_diffusion import device, train
from text_diffusion import run as runs
from text_diffusion.config import TrainConfig
from text_diffusion.device import pick_device, pick_precision
from text_diffusion.distributed import ALONE
from text_diffusion.errors import UserError
from text_diffusion.meter import Meter
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.step import learning_rate
from text_diffusion.validation import validate

# What one step does


def test_micro_batches_change_nothing(go: Trained) -> None:
    """Weights after 5 steps to 1e-6, whole numbers of micro-batches or not; AdamW's eps is out of the way by then."""
    weights = {
        micro: contents(go(f"micro{micro}", steps=5, lr=1e-3, batch_size=24, microbatch=micro) / "model000005.pt")[
            "state"
        ]
        for micro in (0, 24, 12, 10, 2, 100)
    }
    whole = weights.pop(0)
    for state in weights.values():
        for name, weight in state.items():
            torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-6)


def test_micro_batches_do_not_change_the_log(go: Trained) -> None:
    for micro in (0, 10):
        go(f"micro{micro}", steps=3, batch_size=24, microbatch=micro, log_interval=1)
    whole, cut = (metrics(go(f"micro{micro}", steps=3, batch_size=24)) for micro in (0, 10))
    assert len(whole) == 3
    for a, b in zip(whole, cut, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_loss_goes_down(go: Trained) -> None:
    rows = metrics(go(steps=200, lr=0.01, warmup_steps=10, batch_size=32, hidden_size=32, log_interval=20))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["mse"] < 0.8 * rows[0]["mse"]
    assert all(row["loss"] == pytest.approx(row["mse"] + row["tT_loss"] + row["decoder_nll"]) for row in rows)


def test_row(go: Trained) -> None:
    row = json.loads((go(steps=2, log_interval=2) / "metrics.jsonl").read_text())
    assert row["step"] == 2
    assert row["batch_size"] == 8
    assert {"loss", "mse", "tT_loss", "decoder_nll", "lr", "grad_norm", "mse_q1", "mse_q4"} < row.keys()
    assert row["seconds"] > 0
    assert row["sentences_per_s"] == pytest.approx(16 / row["seconds"])


def test_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over steps, quarters of t over sentences, time of the steps alone; and all starts again after a row."""
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    device = torch.device("cpu")
    run: Any = SimpleNamespace(
        config=SimpleNamespace(batch_size=2),
        diffusion=SimpleNamespace(num_timesteps=8),
        device=device,
        objective=OBJECTIVES["diffusion_lm"],
        ranks=ALONE,
    )
    state: Any = SimpleNamespace(step=2, seconds=10.0, optimizer=SimpleNamespace(param_groups=[{"lr": 0.5}]))
    meter = Meter(run)

    def add(t: list[int], mse: list[float], norm: float) -> None:
        values = {"t": torch.tensor(t), "mse": torch.tensor(mse), "loss": 2 * torch.tensor(mse)}
        meter.add(values, torch.tensor(norm))

    add([0, 7], [1.0, 3.0], 1.0)
    add([1, 2], [5.0, 7.0], 2.0)
    expected = {"step": 2, "loss": 8.0, "mse": 4.0, "grad_norm": 1.5, "mse_q1": 3.0, "mse_q2": 7.0, "mse_q4": 3.0}
    rest = {"lr": 0.5, "batch_size": 2, "world_size": 1}
    assert meter.row(state) == expected | rest | {"seconds": 12.0, "sentences_per_s": 2.0}
    next(now)
    meter.restart_clock()
    state.step = 3
    add([4, 5], [1.0, 2.0], 3.0)
    expected = {"step": 3, "loss": 3.0, "mse": 1.5, "grad_norm": 3.0, "mse_q3": 1.5}
    assert meter.row(state) == expected | rest | {"seconds": 13.0, "sentences_per_s": 2.0}
    state.step = 6
    for norm in (1.0, math.inf, math.nan):
        add([4, 5], [1.0, 2.0], norm)
    for look in (meter.check, meter.row):
        with pytest.raises(UserError, match="not at step 5;"):
            look(state)


def test_no_clipping(go: Trained) -> None:
    """0 is as good as a bound that no gradient reaches, whereas 1 is reached."""
    weights = [weights_of(go(str(bound), steps=3, lr=0.1, gradient_clipping=bound)) for bound in (0, 1e9, 0.5)]
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


def test_training_is_deterministic(go: Trained) -> None:
    """And does not depend on what random numbers were used before."""
    options = {"steps": 4, "dropout": 0.2, "eval_interval": 2, "log_interval": 1}
    torch.manual_seed(1)
    first = go("first", **options)
    torch.manual_seed(2)
    second = go("second", **options)
    assert same(everything(first, 4), everything(second, 4))
    assert metrics(first) == metrics(second)
    assert metrics(first, validation=True) == metrics(second, validation=True)


def test_averages_follow_the_weights(corpus: Path, tmp_path: Path) -> None:
    """Each file of each rate, from the raw weights of every step and those at the start."""
    argv = train_flags(corpus, tmp_path / "run", steps=4, lr=0.1, save_interval=1, ema_rate="0.15,0.99")
    untrained = runs.prepare(train.parse(argv))[1]
    initial = {name: weight.detach().clone() for name, weight in untrained.model.named_parameters()}
    assert train.main(argv) == 0
    for rate in (0.15, 0.99):
        average = initial
        for step in range(1, 5):
            decay = min(rate, step / (9 + step))
            raw = contents(tmp_path / "run" / f"model00000{step}.pt")["state"]
            average = {name: decay * average[name] + (1 - decay) * raw[name] for name in raw}
            found = contents(tmp_path / "run" / f"ema_{rate}_00000{step}.pt")["state"]
            for name, weight in found.items():
                torch.testing.assert_close(weight, average[name], rtol=1e-5, atol=1e-6)


def test_every_step_drops_out_anew(go: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    manual_seed = torch.manual_seed

    def spied(seed: int) -> torch.Generator:
        seeds.append(seed)
        return manual_seed(seed)

    monkeypatch.setattr(torch, "manual_seed", spied)
    go(steps=6, dropout=0.1)
    assert len(set(seeds)) == 7, "of the initial weights, and of each step"


def test_learning_rate() -> None:
    """Up over the warm-up, times down to 0: the product of two straight lines."""
    config = TrainConfig(steps=100, lr=2.0, warmup_steps=10)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates == pytest.approx([2 * min(1, (step + 1) / 10) * (1 - step / 100) for step in range(100)])
    assert learning_rate(TrainConfig(steps=4, lr=1.0, warmup_steps=0), 0) == 1


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 arithmetic")
def test_bf16(go: Trained) -> None:
    full = metrics(go("full", steps=20, log_interval=1, eval_interval=10))
    half = metrics(go("half", steps=20, log_interval=1, eval_interval=10, precision="bf16"))
    assert all(math.isfinite(value) for row in half for value in row.values())
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in full], rel=0.05)
    assert half != full


def test_bf16_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32, with a warning; a GPU has it."""
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    assert pick_precision("bf16", torch.device("cpu")) == "float32"
    assert "this CPU has no bf16 arithmetic; going on in float32" in capsys.readouterr().err
    assert pick_precision("float32", torch.device("cpu")) == "float32"
    assert pick_precision("bf16", torch.device("cuda")) == "bf16"
    assert capsys.readouterr().err == ""


def test_each_rank_s_gpu_is_its_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not told which GPU to take takes the one of this rank."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert pick_device("auto", "3,1", replace(ALONE, size=2, local_rank=1)) == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)]


@pytest.mark.parametrize("lines", [LINES[:1] * 3, LINES[:2], LINES[:5]], ids=len)
def test_text_smaller_than_a_batch(lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even a single distinct line trains; it leaves nothing to validate on."""
    mine, folder = write_text(tmp_path / "mine.txt", lines), tmp_path / "run"
    assert train.main(train_flags(mine, folder, steps=4, eval_interval=2)) == 0
    assert len(metrics(folder)) == 1
    assert len(metrics(folder, validation=True)) == (0 if len(set(lines)) == 1 else 2)


def test_last_batch_size_of_one(go: Trained) -> None:
    assert math.isfinite(metrics(go(steps=3, batch_size=1))[-1]["loss"])


# Validation


def test_validation_is_the_same_each_time(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """The same model asked twice, whatever the state of the generators; another model answers otherwise."""
    _, state = runs.prepare(train.parse(train_flags(corpus, tmp_path / "a", steps=1, dropout=0.5)))
    run, other = runs.prepare(train.parse(train_flags(corpus, tmp_path / "b", steps=1, dropout=0.5, seed=1)))
    assert run.held_out is not None
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        rows.append(validate(state.emas[0].model, run.diffusion, run.held_out))
    assert rows[0] == rows[1]
    assert rows[0] != validate(other.emas[0].model, run.diffusion, run.held_out)


def test_validation_is_of_the_average_without_dropout(corpus: Path, go: Trained, tmp_path: Path) -> None:
    """The row in the log is what the weights file gives."""
    folder = go(steps=5, dropout=0.5, lr=0.05, eval_interval=5)
    run, _ = runs.prepare(train.parse(train_flags(corpus, tmp_path / "other", steps=1)))
    assert run.held_out is not None
    rows = {
        name: validate(text_diffusion.load(str(folder / name)).model, run.diffusion, run.held_out)
        for name in ("ema_0.9_000005.pt", "model000005.pt")
    }
    (logged,) = metrics(folder, validation=True)
    assert logged == {"step": 5, "world_size": 1, **rows["ema_0.9_000005.pt"]}
    assert logged["val_loss"] != rows["model000005.pt"]["val_loss"]


def test_validation_rows(trained: Path) -> None:
    rows = metrics(trained, validation=True)
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        assert {"val_loss", "val_mse", "val_tT_loss", "val_decoder_nll", "val_rounding_accuracy"} < row.keys()
        assert row["val_loss"] == pytest.approx(row["val_mse"] + row["val_tT_loss"] + row["val_decoder_nll"])
        assert not {"loss", "mse", "lr"} & row.keys()
        assert 0 <= row["val_rounding_accuracy"] <= 1


def test_validation_changes_nothing(go: Trained) -> None:
    """How often it is done, and whether dropout is on around it."""
    weights = [weights_of(go(f"every{n}", steps=7, dropout=0.3, eval_interval=n)) for n in (0, 1, 3)]
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


def test_sentences_are_shown_at_validation(go: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    go(steps=4, eval_interval=3)
    lines = capsys.readouterr().err.splitlines()
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(f"step {n}  val_")) for n in (3, 4))
    for start_of in (first, last):
        assert all(line.startswith("    ") for line in lines[start_of + 1 : start_of + 5])
