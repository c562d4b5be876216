"""Stopping a run and going on with it changes nothing, whatever stopped it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import (
    COPIED,
    Trained,
    contents,
    everything,
    files,
    metrics,
    same,
    start,
    stop_at,
    train_flags,
)

from text_diffusion import train
from text_diffusion.checkpoint import resumable_steps
from text_diffusion.tracking import trim

HARD_CASES: dict[str, dict[str, Any]] = {
    "uniform": {"schedule_sampler": "uniform"},
    "second moment": {"schedule_sampler": "loss-second-moment", "diffusion_steps": 2, "batch_size": 32},
    "post": {"norm": "post", "self_condition": False, "activation": "gelu"},
    "epochs": {"batch_size": 50, "microbatch": 16},
}


@pytest.mark.parametrize("case", list(HARD_CASES))
@pytest.mark.parametrize("stop", [4, 5])
def test_ten_steps_are_five_and_five(case: str, stop: int, go: Trained) -> None:
    """Bit for bit: weights, averages, optimizer, what is known of each t, and the log, at a row and between two."""
    options = HARD_CASES[case] | {
        "steps": 10, "dropout": 0.1, "ema_rate": "0.2,0.99", "save_interval": 6, "log_interval": 2, "eval_interval": 3,
        "lr": 0.01,
    }  # fmt: skip
    whole = go("whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(stop, patch)
        parts = go("parts", status=130, **options)
    assert resumable_steps(parts)[0] == stop
    go("parts", **options)
    assert same(everything(parts, 10), everything(whole, 10))
    assert same(everything(parts, 6), everything(whole, 6))
    assert metrics(parts, validation=True) == metrics(whole, validation=True)
    assert metrics(parts) == metrics(whole)
    if case == "second moment":
        assert int(everything(parts, 10)["timestep_sampler"]["counts"].min()) > 10, "t was drawn by what was learnt"


def test_stopping_often(go: Trained) -> None:
    """After every step, with SIGTERM or Ctrl-C, in the midst of rows that mean over three steps."""
    options: dict[str, Any] = {"steps": 7, "dropout": 0.1, "log_interval": 3}
    whole = go("whole", **options)
    for step in range(1, 7):
        with pytest.MonkeyPatch.context() as patch:
            number = signal.SIGTERM if step % 2 else signal.SIGINT
            stop_at(step, patch, number)
            go("parts", status=128 + number, **options)
    parts = go("parts", **options)
    assert same(everything(parts, 7), everything(whole, 7))
    assert metrics(parts) == metrics(whole)
    assert [row["step"] for row in metrics(parts)] == [3, 6, 7]


def test_stopping_at_the_last_step_completes_the_run(go: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(5, patch)
        folder = go(steps=5)
    assert (folder / "opt000005.pt").is_file()
    assert "stopped" not in capsys.readouterr().err


def test_message_of_a_stop(go: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch)
        folder = go(status=130, steps=5)
    out, err = capsys.readouterr()
    expected = f"stopped at step 2 of 5 and saved in {folder}; run the same command again to go on"
    assert err.splitlines()[-1] == expected
    assert out == ""


def test_second_ctrl_c_does_not_wait(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step is not finished, nothing is saved, and the next run goes on from the checkpoint before."""
    before = {name: content for name, content in files(copied).items() if name.endswith(".pt")}

    def train_step(*_: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        go(status=130, **COPIED | {"steps": 8})
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert {name: content for name, content in files(copied).items() if name.endswith(".pt")} == before
    go(**COPIED | {"steps": 8})
    assert "going on from step 6" in capsys.readouterr().err


def test_signals_are_the_caller_s_again(go: Trained) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch)
        go(status=130, steps=5)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def stopped_during(name: str, patch: pytest.MonkeyPatch) -> None:
    """Have Ctrl-C come while a function of the training loop runs for the first time."""
    original = getattr(train, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        patch.setattr(train, name, original)
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    patch.setattr(train, name, interrupted)


@pytest.mark.parametrize("step", [2, 3])
def test_stopping_during_validation(step: int, go: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Which takes long, so that Ctrl-C often falls into it."""
    options: dict[str, Any] = {"steps": 6, "eval_interval": step, "log_interval": 2}
    whole = go("whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        stopped_during("evaluate", patch)
        parts = go("parts", status=130, **options)
    last = int(capsys.readouterr().err.splitlines()[-1].split()[3])
    assert (parts / f"opt{last:06d}.pt").is_file(), "saved, as it says"
    assert last >= step
    go("parts", **options)
    assert same(everything(parts, 6), everything(whole, 6))
    assert metrics(parts, validation=True) == metrics(whole, validation=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_a_process(number: int, corpus: Path, tmp_path: Path, go: Trained) -> None:
    """Ctrl-C for real: saved, said, status 128 + the number; the same command goes on as if nothing had been."""
    options: dict[str, Any] = {"steps": 1_000_000, "log_interval": 20, "save_interval": 1_000_000, "dropout": 0.1}
    command = train_flags(corpus, tmp_path / "parts", **options)
    process = start("train", *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = ""
    while "step 20/" not in said:
        line = process.stderr.readline()
        assert line, f"ended early: {said}"
        said += line
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert out == ""
    last = err.splitlines()[-1]
    step = int(last.split()[3])
    assert last == (
        f"stopped at step {step} of 1000000 and saved in {tmp_path / 'parts'}; run the same command again to go on"
    )
    assert (tmp_path / "parts" / f"opt{step:06d}.pt").is_file()
    for name in ("parts", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(step + 5, patch)
            go(name, status=130, **options)
    assert same(everything(tmp_path / "parts", step + 5), everything(tmp_path / "whole", step + 5))


def test_nohup_is_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_that_nobody_listens_to_is_saved(corpus: Path, tmp_path: Path) -> None:
    """`... 2>&1 | head`: what is shown has nowhere to go, after the first row."""
    options: dict[str, Any] = {"steps": 1_000_000, "log_interval": 20, "save_interval": 1_000_000}
    process = start("train", *train_flags(corpus, tmp_path / "run", **options), stderr=subprocess.PIPE)
    assert process.stderr is not None
    while "step 20/" not in process.stderr.readline():
        assert process.poll() is None
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    steps = [int(path.stem.removeprefix("opt")) for path in (tmp_path / "run").glob("opt*.pt")]
    assert len(steps) == 1
    assert steps[0] < 1_000_000


def test_killed_process_loses_what_was_not_saved_only(go: Trained, copied: Path, trained: Path) -> None:
    """After kill -9 there are rows, and perhaps weights, past the last whole checkpoint."""
    (copied / "opt000006.pt").unlink()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    (copied / ".model000006.pt.123.tmp").write_bytes(b"half")
    go(**COPIED)
    assert same(everything(copied, 6), everything(trained, 6))
    assert metrics(copied) == metrics(trained)
    assert metrics(copied, validation=True) == metrics(trained, validation=True)


def test_metrics_that_no_checkpoint_goes_with_are_begun_anew(
    go: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 8, "loss": 1.0}\n')
    folder = go(steps=2, log_interval=1)
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert "metrics.jsonl is begun anew" in capsys.readouterr().err


def test_half_files_of_a_killed_process_go(go: Trained, copied: Path) -> None:
    half = copied / ".model000006.pt.999999999.tmp"
    half.write_bytes(b"half")
    go(**COPIED | {"steps": 7})
    assert not half.exists()


@pytest.mark.parametrize("name", [".notes.tmp", ".model000007.pt.PID.tmp"])
def test_other_temporary_files_stay(name: str, go: Trained, copied: Path) -> None:
    """Of the user, of another program, or of a run that is just writing: its process is alive."""
    other = copied / name.replace("PID", str(os.getppid()))
    other.write_bytes(b"theirs")
    go(**COPIED | {"steps": 7})
    assert other.read_bytes() == b"theirs"


def test_time_of_training_is_counted_over_all_parts(go: Trained, copied: Path) -> None:
    opt = contents(copied / "opt000006.pt")
    assert 0 < opt["seconds"] < 100
    torch.save(opt | {"seconds": 1000.0}, copied / "opt000006.pt")
    go(**COPIED | {"steps": 8})
    last = json.loads((copied / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 8
    assert 1000 < last["seconds"] < 1100


def test_log_has_each_step_once(go: Trained, trained: Path, copied: Path) -> None:
    """Whatever is in it when a run goes on: rows past the checkpoint, a line cut short, blank lines, no rows."""
    rows = (copied / "metrics.jsonl").read_text()
    (copied / "metrics.jsonl").write_text(rows + '\n{"step": 6}\n[]\n{"step": 7, "loss": 3}\n{"step": 8, "lo')
    go(**COPIED | {"steps": 10})
    for validation in (False, True):
        found = metrics(copied, validation)
        expected = metrics(trained, validation)
        assert [row for row in found if row["step"] <= 6 and len(row) > 1] == expected
    train_steps = [row["step"] for row in metrics(copied) if len(row) > 1]
    assert train_steps == [2, 4, 6, 8, 10]
    assert [row["step"] for row in metrics(copied, validation=True)] == [3, 6, 9, 10]


@pytest.mark.parametrize(
    ("text", "step", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2, '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 2', 5, '{"step": 1}\n'),
        ('{"step": 1}\n', 0, ""),
        ('{"loss": 1}\n7\n\n{"step": 1}', 5, '{"step": 1}\n'),
        ("", 3, ""),
    ],
)
def test_trim(text: str, step: int, kept: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    trim(path, step)
    assert not path.exists()
    path.write_text(text)
    trim(path, step)
    assert path.read_text() == kept
