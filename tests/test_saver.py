"""Checkpoints in the background: training goes on, nothing changes them, errors are said; kills lose nothing."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import SRC, contents, environment, everything, files, one_sentence, same, stop_at, train_flags, weights_of

from text_diffusion import checkpoint, train
from text_diffusion import corpus as corpora
from text_diffusion import snapshot as snapshots
from text_diffusion import step as step_module
from text_diffusion.checkpoint import resumable_steps
from text_diffusion.errors import UserError
from text_diffusion.snapshot import (
    Snapshot,
    prune,
    remove_shards,
    remove_stray_shards,
    shards_path,
    whole,
    write_shards,
)

OPTIONS: dict[str, Any] = {"steps": 6, "save_interval": 3, "log_interval": 1}


def test_training_does_not_wait(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first checkpoint is held up until the last step begins; it is still that of step 3."""
    assert train.main(train_flags(corpus, tmp_path / "plain", **OPTIONS, save_async=False)) == 0
    release = threading.Event()
    write, original = checkpoint.write, step_module.train_step

    def slow(path: Path, what: dict[str, Any]) -> None:
        assert release.wait(60)
        write(path, what)

    def train_step(run: Any, state: Any, loss: Any) -> Any:
        result = original(run, state, loss)
        if state.step == 6:
            assert not list((tmp_path / "run").glob("*.pt")), "it was not waited for"
            release.set()
        return result

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(train, "train_step", train_step)
    assert train.main(train_flags(corpus, tmp_path / "run", **OPTIONS)) == 0
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "plain"))
    opt, expected = (contents(tmp_path / name / "opt000003.pt") for name in ("run", "plain"))
    for name in ("optimizer", "emas", "step", "timestep_sampler", "loss_by_timestep"):
        assert same(opt[name], expected[name])


def test_error_in_the_background_ends_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the next step or save, in a sentence; the checkpoints before are whole."""
    write = checkpoint.write

    def full(path: Path, what: dict[str, Any]) -> None:
        if what["step"] > 3:
            raise UserError(f"{path}: cannot be written: No space left on device")
        write(path, what)

    monkeypatch.setattr(checkpoint, "write", full)
    assert train.main(train_flags(corpus, tmp_path, **OPTIONS | {"steps": 9})) == 1
    assert "model000006.pt: cannot be written: No space left" in one_sentence(capsys.readouterr().err)
    assert resumable_steps(tmp_path) == [3]
    assert not list(tmp_path.glob(".*")), "no lock, no half files"


def test_keep_last(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """The newest stay; of another run, or without an opt file, everything stays."""
    foreign = {name: raw for name, raw in files(trained).items() if name in ("model000003.pt", "model000006.pt")}
    for name, raw in foreign.items():
        (tmp_path / name.replace("6", "1")).write_bytes(raw)
    assert train.main(train_flags(corpus, tmp_path, steps=5, save_interval=1, keep_last=2)) == 0
    assert resumable_steps(tmp_path) == [5, 4]
    assert {path.name for path in tmp_path.glob("model*")} == {
        "model000001.pt", "model000003.pt", "model000004.pt", "model000005.pt",
    }  # fmt: skip
    assert (tmp_path / "model000003.pt").read_bytes() == foreign["model000003.pt"]
    prune(tmp_path, "another run", 1)
    assert resumable_steps(tmp_path) == [5, 4]
    prune(tmp_path, contents(tmp_path / "opt000005.pt")["run"], 0)
    assert resumable_steps(tmp_path) == [5, 4]


def test_a_damaged_checkpoint_takes_no_place_of_those_that_are_kept(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that fell back from a damaged one and is stopped before that step again can still go on."""
    assert train.main(train_flags(corpus, tmp_path, steps=8, save_interval=2)) == 0
    opt = tmp_path / "opt000008.pt"
    opt.write_bytes(opt.read_bytes()[:-200])
    again = train_flags(corpus, tmp_path, steps=8, save_interval=100, keep_last=1)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(7, patch)
        assert train.main(again) != 0
    assert resumable_steps(tmp_path) == [8, 7]
    assert train.main(again) == 0
    assert "going on from step 7" in capsys.readouterr().err
    assert resumable_steps(tmp_path) == [8]


def test_a_checkpoint_that_comes_while_a_run_begins(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the run before, still stopping as its successor begins: that must not start from 0 beside it."""
    ours, load = train_flags(corpus, tmp_path / "run", steps=4), corpora.load

    def slow(*args: Any) -> corpora.Corpus:
        monkeypatch.setattr(corpora, "load", load)
        assert train.main(ours) == 0
        return load(*args)

    monkeypatch.setattr(corpora, "load", slow)
    assert train.main(ours) == 1
    assert "run the same command again" in one_sentence(capsys.readouterr().err)
    before = files(tmp_path / "run")
    assert train.main(ours) == 0
    assert "complete at step 4" in capsys.readouterr().err
    assert files(tmp_path / "run").keys() == before.keys()


def test_an_opt_file_of_another_kind(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"optimizer": {}}, tmp_path / "opt000006.pt")
    assert train.main(train_flags(corpus, tmp_path, steps=4)) == 1
    assert "found one without" in one_sentence(capsys.readouterr().err)


class Killed(BaseException):
    """Nothing of ours catches it."""


def test_killed_when_it_comes_to_a_damaged_checkpoint_s_step_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between new weights and their opt file the old one stands, of the same run and step and as many bytes, but with
    other contents: the run goes on with another weight decay. Together they are no checkpoint."""
    once = train_flags(corpus, tmp_path / "run", steps=4, save_interval=2)
    assert train.main(once) == 0
    damaged = tmp_path / "run" / "ema_0.9_000004.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    other, expected = ([*once, "--weight_decay", "0.5"] for _ in range(2))
    expected[expected.index(str(tmp_path / "run"))] = str(tmp_path / "whole")
    assert train.main(expected) == 0

    write = checkpoint.write

    def kill_before_opt(path: Path, what: dict[str, Any]) -> None:
        if path.name == "opt000004.pt":
            raise Killed
        write(path, what)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", kill_before_opt)
        with pytest.raises(Killed):
            train.main(other)
    assert {path.name for path in (tmp_path / "run").glob("*4.pt")} >= {"opt000004.pt", "model000004.pt", damaged.name}
    capsys.readouterr()
    assert train.main(other) == 0
    err = capsys.readouterr().err
    assert "model000004.pt: expected what belongs to opt000004.pt, found another snapshot's" in err
    assert "going on from step 2 " in err
    assert same(everything(tmp_path / "run", 4), everything(tmp_path / "whole", 4))


def test_shards_of_another_snapshot_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    def write(mark: str) -> dict[str, Any]:
        """As the ranks do, with shards of as many bytes each time."""
        shards = shards_path(tmp_path, 4)
        remove_shards(tmp_path, 4)
        with pytest.warns(UserWarning, match="single process"):  # as it is
            write_shards(shards, {"a": torch.ones(2)}, None)
        opt = {"run": "r", "step": 4, "snapshot": mark, **dict.fromkeys(snapshots.NEEDED - {"run", "step", "weights"})}
        weights = {"run": "r", "snapshot": mark}
        Snapshot("r", 4, [(None, weights)], opt, {"a": torch.ones(2)}).write(tmp_path)
        return whole(tmp_path, 4)

    assert write("first")["snapshot"] == "first"
    opt, model = ((tmp_path / name).read_bytes() for name in ("opt000004.pt", "model000004.pt"))
    write("second")
    for name, raw in (("opt000004.pt", opt), ("model000004.pt", model)):  # as if a kill had come after the shards
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match="found another snapshot's"):
        whole(tmp_path, 4)


def test_stray_shards(tmp_path: Path) -> None:
    """Those of a run that was killed before it wrote the opt file go; others stay."""
    for name in ("opt000001.shards", "opt000002.shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard.safetensors").touch()
    (tmp_path / "opt000001.pt").touch()
    remove_stray_shards(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opt000001.pt", "opt000001.shards"]


def test_frozen() -> None:
    tensor = torch.ones(2)
    copy = snapshots.frozen({"a": [tensor, 1], "b": "x"})
    tensor.zero_()
    assert torch.equal(copy["a"][0], torch.ones(2))
    assert copy["a"][1:] == [1]
    assert copy["b"] == "x"


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="no fork")
def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """A few of benchmarks/faults.py, at other moments each time that the tests run."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import faults; "
    program += "print(faults.run(3, int(sys.argv[2]), faults.KINDS[:1]))"
    folder = SRC.parent / "benchmarks"
    seed = str(time.time_ns() % 2**32)
    command = [sys.executable, "-c", program, str(folder), seed]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (seed, result.stdout, result.stderr)
    figures = ast.literal_eval(result.stdout.splitlines()[-1])
    assert figures["equal"] == figures["runs"] == 3, (seed, result.stdout)
