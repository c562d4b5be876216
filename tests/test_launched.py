"""The command under its launchers: one log, one end for all ranks, and going on after it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import SRC, environment, everything, files, metrics, same, train_flags, weights_of
from zygote import Zygote, ended, start_ranks, unless_crashed, wait_for

from text_diffusion import train

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
has_mpi = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: pip install mpich mpi4py")


@has_mpi
def test_command_under_mpiexec(corpus: Path, tmp_path: Path) -> None:
    """The same log as one process, each row says how many; and one process goes on where two stopped."""
    options: dict[str, Any] = {"steps": 6, "save_interval": 3, "log_interval": 1, "eval_interval": 3, "lr": 1e-3}
    one = tmp_path / "one"
    assert train.main(train_flags(corpus, one, **options)) == 0
    two = tmp_path / "two"
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "text_diffusion", "train"]
    command += train_flags(corpus, two, keep_last=1, **options)
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    out, err = result.stdout, result.stderr
    assert result.returncode == 0, err
    assert out == f"written the weights to {two / 'ema_0.9_000006.pt'}\n"
    assert err.count("held out\n") <= 2, "one rank speaks"
    assert set(files(one)) - set(files(two)) == {f"{kind}000003.pt" for kind in ("model", "ema_0.9_", "opt")}
    for row, expected in zip(metrics(two) + metrics(two, True), metrics(one) + metrics(one, True), strict=True):
        assert row["world_size"] == 2
        assert row == pytest.approx(expected | {"world_size": 2}, rel=1e-4, abs=1e-7)
    assert train.main(train_flags(corpus, two, **options | {"steps": 8})) == 0
    assert train.main(train_flags(corpus, one, **options | {"steps": 8})) == 0
    for name, weights in weights_of(two, "*8.pt").items():
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, weights_of(one, "*8.pt")[name][key], rtol=1e-3, atol=1e-5)


@has_mpi
def test_a_rank_that_is_killed_under_mpiexec(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    """It ends all; by the same command the run goes on, and ends bit for bit like two ranks that nobody disturbed."""
    options: dict[str, Any] = {"steps": 60, "save_interval": 10, "log_interval": 20}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "text_diffusion", "train"]
    command += train_flags(corpus, killed, **options)
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (killed / "opt000010.pt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int((killed / ".lock").read_text().split()[1]), signal.SIGKILL)  # rank 0
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
    assert not (killed / "opt000060.pt").exists()
    assert ended(start_ranks(zygote, *[["train", *train_flags(corpus, whole, **options)]] * 2)) == [0, 0]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "going on from step" in result.stderr
    assert same(everything(killed, 60), everything(whole, 60))
    assert metrics(killed) == metrics(whole)


@has_mpi
@pytest.mark.parametrize("library", ["torch", "mpi4py"])
def test_a_rank_that_cannot_load_a_library(library: str, corpus: Path, tmp_path: Path) -> None:
    """After MPI has started there, or before: all ranks end, and one says why."""
    broken = tmp_path / "broken" / library
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise ModuleNotFoundError('No module named {library}', name={library!r})\n")
    command = [sys.executable, "-m", "text_diffusion", "train", *train_flags(corpus, tmp_path / "run", steps=100_000)]
    without = ["env", f"PYTHONPATH={broken.parent}{os.pathsep}{SRC}", *command]
    result = subprocess.run(
        [str(MPIEXEC), "-n", "1", *command, ":", "-n", "1", *without],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode != 0
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"No module named {library}" in error
    assert "pip install" in error
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_stop_and_kill(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank stops all after the same step; SIGKILL of one ends all; what follows is bit for bit the run
    that was never stopped, sharded too."""
    options: dict[str, Any] = {"steps": 60, "save_interval": 10, "log_interval": 20, "parallel": "fsdp"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    undisturbed = [["train", *train_flags(corpus, whole, **options)]] * 2
    assert unless_crashed(lambda _: ended(start_ranks(zygote, *undisturbed))) == [0, 0]

    commands = [["train", *train_flags(corpus, parts, **options)]] * 2
    ranks = start_ranks(zygote, *commands)
    wait_for(parts / "opt000010.pt", ranks)
    ranks[1].send(signal.SIGTERM)
    assert ended(ranks) == [143, 143]
    assert "run the same command again" in ranks[0].err
    assert ranks[1].err.strip() == ""

    step = int(max(parts.glob("opt*.pt")).stem[3:])
    ranks = start_ranks(zygote, *commands)
    wait_for(parts / f"opt{step // 10 * 10 + 10:06d}.pt", ranks)
    ranks[1].send(signal.SIGKILL)
    assert ended(ranks) == [1, -signal.SIGKILL]
    assert "error: rank 0 lost the connection to another rank" in ranks[0].err

    before, step = sorted(int(path.stem[3:]) for path in parts.glob("opt*.pt"))[-2:]
    shard = max(parts.glob(f"opt{step:06d}.shards/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    ranks = start_ranks(zygote, *commands)
    assert ended(ranks) == [0, 0]
    assert f"warning: passed over: {shard}: expected a shard of" in ranks[0].err
    assert f"going on from step {before} " in ranks[0].err
    assert same(weights_of(parts, "*60.pt"), weights_of(whole, "*60.pt"))


@pytest.mark.slow
def test_torchrun_starts_again(corpus: Path, tmp_path: Path) -> None:
    """A rank that is killed under an elastic torchrun costs what was not saved, and no more: the end is bit for bit
    that of two ranks that nobody has disturbed."""
    options: dict[str, Any] = {"steps": 300, "save_interval": 20, "log_interval": 100}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    torchrun += ["-m", "text_diffusion", "train"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with (tmp_path / "log").open("w") as log:
        command = [*torchrun, *train_flags(corpus, killed, **options)]
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not (killed / "opt000040.pt").exists():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(300) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert "going on from step" in (tmp_path / "log").read_text()
    subprocess.run([*torchrun, *train_flags(corpus, whole, **options)], env=environment(), check=True, timeout=300)
    assert same(everything(killed, 300), everything(whole, 300))
    assert metrics(killed) == metrics(whole)


def test_three_ranks_go_on_where_they_were(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    """Bit for bit: of more than two ranks the order of sums depends on where in its message a gradient stands."""
    options: dict[str, Any] = {"steps": 4, "save_interval": 2, "batch_size": 12, "hidden_size": 192, "num_layers": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    commands = [["train", *train_flags(corpus, folder, **options)] for folder in (whole, parts)]
    assert ended(start_ranks(zygote, *commands[:1] * 3)) == [0] * 3
    shutil.copytree(whole, parts)
    for path in parts.glob("*4.pt"):
        path.unlink()
    ranks = start_ranks(zygote, *commands[1:] * 3)
    assert ended(ranks) == [0] * 3
    assert "going on from step 2 " in ranks[0].err
    assert same(everything(parts, 4), everything(whole, 4))
