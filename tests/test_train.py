"""Training: stopping and going on changes nothing, mistakes are found before the work, and nothing is lost."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import (
    HAS_BF16,
    LINES,
    FakeWandb,
    contents,
    everything,
    files,
    flags,
    metrics,
    one_sentence,
    same,
    start,
    stop_at,
    train_flags,
    weights_of,
    write_text,
)

import text_diffusion
from text_diffusion import config as settings
from text_diffusion import run as runs
from text_diffusion import train
from text_diffusion.checkpoint import resumable_steps
from text_diffusion.config import DiffusionConfig, ModelConfig, TrainConfig
from text_diffusion.device import pick_precision
from text_diffusion.distributed import ALONE
from text_diffusion.errors import UserError
from text_diffusion.meter import Meter
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.step import learning_rate
from text_diffusion.tokenizer import train_word_level
from text_diffusion.tracking import clock, trim
from text_diffusion.validation import validate

Trained = Callable[..., Path]


@pytest.fixture
def go(corpus: Path, tmp_path: Path) -> Trained:
    """Train on the toy corpus into a folder below tmp_path, and return that folder."""

    def go(name: str = "run", status: int = 0, **options: Any) -> Path:
        folder = tmp_path / name
        assert train.main(train_flags(corpus, folder, **options)) == status
        return folder

    return go


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the complete run of 6 steps, at tmp_path / "run"."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


COPIED = {"steps": 6, "save_interval": 3, "log_interval": 2, "eval_interval": 3}  # how it was made

# Stopping and going on

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


@pytest.mark.parametrize("name", ["opt000006.pt", "model000006.pt", "ema_0.9_000006.pt"])
def test_damaged_checkpoint_is_passed_over(
    name: str, go: Trained, trained: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weights file that cannot be read is replaced if the run's own opt file names it."""
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[: len(whole) // 2])
    go(**COPIED)
    err = capsys.readouterr().err
    assert f"warning: passed over: {copied / name}: expected a whole checkpoint" in err
    assert "going on from step 3" in err
    assert not list(copied.glob("*.new.pt"))
    opt, expected = contents(copied / "opt000006.pt"), contents(trained / "opt000006.pt")
    assert same([opt[part] for part in ("optimizer", "emas")], [expected[part] for part in ("optimizer", "emas")])
    assert same(contents(copied / opt["weights"])["state"], contents(trained / "model000006.pt")["state"])
    assert metrics(copied) == metrics(trained)
    go(**COPIED | {"steps": 7})
    assert "going on from step 6" in capsys.readouterr().err


def test_no_whole_checkpoint_left(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then nothing is overwritten: somebody may want to mend it."""
    for step in (3, 6):
        (copied / f"opt00000{step}.pt").write_bytes(b"")
    before = files(copied)
    go(status=1, **COPIED)
    assert f"{copied}: expected a whole checkpoint to go on from, found none" in one_sentence(capsys.readouterr().err)
    assert files(copied) == before


def test_foreign_file_under_the_name_of_a_checkpoint(
    go: Trained, trained: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(copied / "model000006.pt", copied / "opt000009.pt")
    go(**COPIED)
    assert "expected an opt file, found one without" in capsys.readouterr().err
    assert same(everything(copied, 6), everything(trained, 6))


def test_weights_of_another_run_in_the_place_of_one_s_own(
    go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied there by hand; training on from them would be neither run."""
    shutil.copyfile(go("other", **COPIED) / "model000006.pt", copied / "model000006.pt")
    before = files(copied)
    go(status=1, **COPIED | {"steps": 8})
    error = one_sentence(capsys.readouterr().err)
    assert f"{copied / 'model000006.pt'}: expected the weights of the run in this folder, found another run's" in error
    assert files(copied) == before


# Weights without an opt file


def test_weights_alone_are_no_run_to_go_on_with(
    go: Trained, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training starts at 0, and writes beside weights that stand under the very names that it would use."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(trained / "ema_0.9_000006.pt", folder / "ema_0.9_000003.pt")
    (folder / "ema_0.9_000006.pt").write_bytes(b"\xff\xd8\xff")
    (folder / "model000006.pt").write_bytes(b"")
    before = files(folder)
    go(**COPIED)
    out, err = capsys.readouterr()
    after = files(folder)
    assert "going on" not in err
    assert before.items() <= after.items()
    assert "ema_0.9_000006.pt cannot be read, nor is it known whose it is, and stays; written to ema_0.9_00" in err
    assert "ema_0.9_000003.pt belongs to another run and stays; written to ema_0.9_000003.new.pt instead" in err
    assert out.splitlines()[-1] == f"written the weights to {folder / 'ema_0.9_000006.new.pt'}"
    for name in ("ema_0.9_000003", "ema_0.9_000006", "model000006"):
        assert same(contents(folder / f"{name}.new.pt")["state"], contents(trained / f"{name}.pt")["state"])
    assert text_diffusion.load(str(folder / "ema_0.9_000006.new.pt")).sample(2, steps=3)

    capsys.readouterr()
    go(**COPIED | {"steps": 8})
    assert "going on from step 6" in capsys.readouterr().err
    assert before.items() <= files(folder).items()


def test_weights_of_three_runs_stay(go: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kept: dict[str, bytes] = {}
    for seed in (1, 2, 3):
        go(steps=2, seed=seed)
        (folder / "opt000002.pt").unlink()
        assert kept.items() <= files(folder).items()
        kept |= {name: content for name, content in files(folder).items() if name.endswith(".pt")}
    assert len(kept) == 6


# Running again, with the same flags or others


def test_complete_run_stays_as_it_is(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copied)
    go(**COPIED)
    out, err = capsys.readouterr()
    assert f"the run in {copied} is complete at step 6; a larger STEPS extends it" in err
    assert out == ""
    after = files(copied)
    args = [json.loads(part.pop("training_args.json")) for part in (before, after)]
    assert after == before
    assert args[0]["train"] | {"checkpoint_path": str(copied)} == args[1]["train"]


def test_run_is_extended(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(**COPIED | {"steps": 8})
    err = capsys.readouterr().err
    assert "going on from step 6" in err
    assert "STEPS was 6 and is 8: the learning-rate schedule changed" in err
    assert contents(copied / "opt000008.pt")["step"] == 8
    assert metrics(copied)[-1]["lr"] == pytest.approx(TrainConfig().lr * 8 / 100 * (1 - 7 / 8))
    go(**COPIED | {"steps": 8})
    assert "the learning-rate schedule changed" not in capsys.readouterr().err


def test_run_goes_on_with_its_own_settings(corpus: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only where and how far has to be given: sizes, text and tokenizer are the run's."""
    assert train.main(flags(checkpoint_path=copied, steps=7)) == 0
    assert "toy: 76 training" in capsys.readouterr().err
    assert contents(copied / "model000007.pt")["model"]["hidden_size"] == 16


def test_steps_below_the_present_step(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copied)
    go(status=1, **COPIED | {"steps": 5})
    error = one_sentence(capsys.readouterr().err)
    assert f"STEPS must be at least 6, where the run in {copied} is, found 5" in error
    assert files(copied) == before


OTHERS: dict[str, object] = {
    "in_channel": 4, "hidden_size": 32, "num_layers": 2, "num_heads": 1, "num_channels": 4, "activation": "gelu",
    "norm": "post", "dropout": 0.1, "self_condition": False, "diffusion_steps": 10, "noise_schedule": "cosine",
    "schedule_sampler": "loss-second-moment", "tokenizer": "byte-level", "sequence_len": 7, "long_lines": "drop",
    "batch_size": 4, "seed": 1, "ema_rate": "0.9,0.99", "objective": "autoregressive", "stratified": True,
    "output_prior": False, "known_words": False, "condition": "labels", "drop_condition": 0.5, "source_len": 5,
}  # fmt: skip


def test_settings_of_a_run_for_life() -> None:
    """The table above is complete."""
    assert runs.FIXED == OTHERS.keys()
    assert {*ModelConfig.__dataclass_fields__, *DiffusionConfig.__dataclass_fields__} < runs.FIXED


@pytest.mark.parametrize("name", list(OTHERS))
def test_contradictions_are_refused(name: str, go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copied)
    go(status=1, **COPIED | {"steps": 8, name: OTHERS[name]})
    error = one_sentence(capsys.readouterr().err)
    assert f"the run in {copied} was started with --{name} " in error
    assert (
        f"found {OTHERS[name] if name != 'ema_rate' else (0.9, 0.99)}; give --checkpoint_path another folder" in error
    )
    assert files(copied) == before


def test_settings_that_are_repeated_are_no_contradiction(go: Trained, copied: Path) -> None:
    """The length chosen when the run was new, spelt out or left open."""
    for length in (0, 8):
        go(**COPIED | {"sequence_len": length, "seed": 102, "dropout": 0.0, "norm": "pre"})


def test_changed_text_is_refused(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, folder = write_text(tmp_path / "toy.txt", LINES), tmp_path / "run"
    assert train.main(train_flags(mine, folder, steps=2)) == 0
    write_text(mine, [*LINES, "One more line."])
    before = files(folder)
    capsys.readouterr()
    assert train.main(train_flags(mine, folder, steps=4)) == 1
    error = one_sentence(capsys.readouterr().err)
    assert f"{mine}: expected the text that the run in {folder} was started with, found another" in error
    assert files(folder) == before
    write_text(mine, LINES)
    assert train.main(train_flags(mine, folder, steps=4)) == 0


def test_run_keeps_its_tokenizer(go: Trained, copied: Path) -> None:
    """As the README does: the tokenizer is trained again beside the corpus, with other ids, and the run goes on."""
    path = copied / "word-level-vocab.json"
    vocab = json.loads(path.read_text())
    before = contents(copied / "opt000006.pt")["tokenizer"]
    ids = vocab["model"]["vocab"]
    ids["Ġred"], ids["Ġblue"] = ids["Ġblue"], ids["Ġred"]
    path.write_text(json.dumps(vocab))
    go(**COPIED | {"steps": 8})
    assert contents(copied / "opt000008.pt")["tokenizer"] == before


def test_tokenizer_by_another_path_or_changed(go: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in the file counts, not where it lies."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(train_word_level(LINES).to_json())
    folder = go(steps=1, tokenizer=first)
    before = contents(folder / "opt000001.pt")["tokenizer"]
    shutil.copy(first, second)
    go(steps=2, tokenizer=second)
    assert contents(folder / "opt000002.pt")["tokenizer"] == before
    second.unlink()
    go(steps=3, tokenizer=second)  # it is in the checkpoint
    capsys.readouterr()
    cases = ([*LINES, "more"], False), (LINES, True)
    for lines, lowercase in cases:
        second.write_text(train_word_level(lines, lowercase=lowercase).to_json())
        go(status=1, steps=4, tokenizer=second)
        assert f"{second}: expected the tokenizer that the run was started with" in one_sentence(
            capsys.readouterr().err
        )
    go(status=1, steps=4, tokenizer=tmp_path / "none.json")
    assert "expected a tokenizer's JSON file, found none" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("text", ['{"diffusion_steps": 2000, "sequence_len": 64}', "[]", "{"])
def test_settings_of_another_program_stay(
    text: str, go: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of the original are of no use without theirs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_args.json").write_text(text)
    before = files(tmp_path)
    go(status=1, steps=1)
    assert "training_args.json: expected the settings of a run of this program" in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == before


def test_leftover_tokenizer_of_a_run_that_died(go: Trained, trained: Path, tmp_path: Path) -> None:
    """In the folder of a new run on a file of one's own it is not trusted."""
    (tmp_path / "run").mkdir()
    other = train_word_level(["Not a word of the corpus"])
    (tmp_path / "run" / "word-level-vocab.json").write_text(other.to_json())
    folder = go(steps=1)
    assert contents(folder / "opt000001.pt")["tokenizer"] == contents(trained / "opt000006.pt")["tokenizer"]


def test_other_settings_may_change(go: Trained, copied: Path) -> None:
    """A value on the command line beats the saved one, and is saved in its turn."""
    go(
        **COPIED
        | {"steps": 9, "lr": 0.5, "warmup_steps": 0, "log_interval": 1, "microbatch": 4, "gradient_clipping": 0}
    )
    assert metrics(copied)[-1]["lr"] == pytest.approx(0.5 / 9)
    saved = json.loads((copied / "training_args.json").read_text())["train"]
    assert (saved["lr"], saved["microbatch"]) == (0.5, 4)
    assert train.main(flags(checkpoint_path=copied, steps=10)) == 0
    assert metrics(copied)[-1]["lr"] == pytest.approx(0.5 / 10)


def test_weight_decay_may_change(go: Trained, copied: Path, tmp_path: Path) -> None:
    shutil.copytree(copied, tmp_path / "other")
    go("run", **COPIED | {"steps": 8, "lr": 0.1})
    go("other", **COPIED | {"steps": 8, "lr": 0.1, "weight_decay": 0.5})
    assert not same(weights_of(tmp_path / "run", "*8.pt"), weights_of(tmp_path / "other", "*8.pt"))


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
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert pick_precision("bf16", torch.device("cpu")) == "float32"
    assert "this CPU has no bf16 arithmetic; going on in float32" in capsys.readouterr().err
    assert pick_precision("float32", torch.device("cpu")) == "float32"
    assert pick_precision("bf16", torch.device("cuda")) == "bf16"
    assert capsys.readouterr().err == ""


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


# Mistakes


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
        ({"init_pretrained": True}, "--init_pretrained expects False"),
        ({"freeze_embeddings": "x"}, "--freeze_embeddings expects False"),
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
    compiled = weights_of(go("compiled", steps=3, compile=True))
    assert len(traced) == 1
    torch._dynamo.reset()
    assert compiled.keys() == plain.keys()
    for name, state in compiled.items():
        for key, weight in state.items():
            torch.testing.assert_close(weight, plain[name][key], rtol=0, atol=1e-6)


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
    assert small.keys() == base.keys()
    assert settings.build(ModelConfig, small) == ModelConfig()
    assert settings.build(TrainConfig, small) == TrainConfig()


def test_named_size_contradicts_another(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The copied run is of neither size."""
    assert train.main(flags(checkpoint_path=copied, steps=8, size="base")) == 1
    assert "was started with --" in one_sentence(capsys.readouterr().err)
    assert train.main(flags(checkpoint_path=copied, steps=8, size="small")) == 1
    assert "was started with --" in one_sentence(capsys.readouterr().err)


def test_original_s_positions_pass_through() -> None:
    positions = flags(init_pretrained=False, pretrained_embeddings="false", freeze_embeddings="False")
    assert train.parse(positions) == {}
