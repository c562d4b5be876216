"""Several ranks do what one does: gradients, weights, sentences; and they end together, whatever happens to one."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_worker import CASES
from toy import LINES, environment, everything, files, metrics, one_sentence, same, train_flags, weights_of, write_text
from zygote import Process, Zygote, ended

from text_diffusion import train
from text_diffusion.distributed import ALONE, Ranks
from text_diffusion.errors import Refused, UserError
from text_diffusion.launcher import Place, find_place, first_host
from text_diffusion.lock import FolderLock

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
has_mpi = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec: pip install mpich mpi4py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Where the processes of these tests come from."""
    zygote = Zygote(tmp_path_factory.mktemp("logs"))
    yield zygote
    zygote.close()


def start_ranks(zygote: Zygote, *commands: list[str]) -> list[Process]:
    """Start a rank for each command, as torchrun would."""
    port, size = str(free_port()), str(len(commands))
    return [
        zygote.start(
            *command, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        for rank, command in enumerate(commands)
    ]


def wait_for(path: Path, processes: list[Process], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        assert all(process.status() is None for process in processes), [process.err for process in processes]
        time.sleep(0.02)


# The launcher's word


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place()),
        ({"NPROC": ""}, Place()),
        ({"NPROC": "1", "PMI_SIZE": "1", "SLURM_NTASKS": "1"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
             "MASTER_PORT": "5", "PMI_SIZE": "9", "SLURM_NTASKS": "7"},
            Place("torchrun", 3, 4, 1, 2, "h", 5),
        ),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[07-08]",
             "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            Place("srun", 2, 4, 0, 2, "n07", 20_109),
        ),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place()),
    ],
    ids=["none", "empty", "ones", "one", "torchrun", "srun", "sbatch"],
)  # fmt: skip
def test_place(env: dict[str, str], place: Place) -> None:
    assert find_place(env) == place


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NPROC": "2"}, "expected 2 processes (NPROC=2), found 1"),
        ({"NPROC": "x"}, "found NPROC=x"),
        ({"WORLD_SIZE": "2"}, "expected RANK beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": ""}, "found WORLD_SIZE="),
        ({"PMI_SIZE": "0"}, "found PMI_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "expected MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "expected a rank below 2, found 2"),
        ({"SLURM_NTASKS": "2"}, "expected SLURM_STEP_NODELIST"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n"}, "expected the variable SLURM_LOCALID"),
    ],
    ids=str,
)
def test_launchers_that_contradict_themselves(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        find_place(env)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a[03-07,9],b", "a03"), ("node1", "node1"), ("n[1,2]-ib", "n1-ib"), ("x,y", "x"), ("", "")],
)
def test_first_host_of_slurm(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_single_process_has_no_process_group(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("a process group"))
    assert train.main(train_flags(corpus, tmp_path, steps=1)) == 0
    assert [row["world_size"] for row in metrics(tmp_path)] == [1]


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 48, 49])
def test_shares(size: int, n: int) -> None:
    """They follow each other, cover everything once, begin at even places, and are equal where that is possible."""
    shares = [Ranks(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in range(n)[share]] == list(range(n))
    assert all(share.start % 2 == 0 for share in shares)
    if n % (2 * size) == 0:
        assert {share.stop - share.start for share in shares} == {n // size}


def test_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    assert ALONE.join(tensors) is tensors
    assert ALONE.gather(3) == [3]
    assert ALONE.total({"a": 1.5}) == {"a": 1.5}
    assert ALONE.together(lambda: 4) == 4
    assert not ALONE.any(False)
    ALONE.agree("flags", {"a": 1})


# The same on 1, 2 and 4 ranks

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """What the worker found, by the number of ranks."""
    results = {}
    texts = tmp_path_factory.mktemp("texts")
    corpus = write_text(texts / "toy.txt", LINES)
    write_text(texts / "toy.tsv", [f"{line}\t{line.split()[1]}" for line in LINES])
    for size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        processes = start_ranks(zygote, *[["worker", str(corpus), str(folder)]] * size)
        assert ended(processes) == [0] * size, [process.err for process in processes]
        results[size] = torch.load(folder / "found.pt", weights_only=True)
    return results


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_do_what_one_does(case: str, size: int, found: dict[int, Found]) -> None:
    several, one = found[size][case], found[1][case]
    assert difference(several["grad"], one["grad"]) < 1e-6
    assert difference(several["losses"], one["losses"]) < 1e-5
    assert several["losses"].shape == one["losses"].shape
    for name in ("weights", "averages", "by t"):
        assert difference(several[name], one[name]) < 1e-4, name
    assert several["sentences"] == one["sentences"]
    assert several["validation"] == pytest.approx(one["validation"], rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_fsdp_is_ddp(size: int, found: dict[int, Found]) -> None:
    """After 50 steps; and each rank holds its share of parameters and moments only."""
    ddp, fsdp = found[size]["ddp"], found[size]["fsdp"]
    for name in ("grad", "weights", "averages", "losses"):
        assert difference(fsdp[name], ddp[name]) < 1e-6, name
    assert fsdp["held"] < 1.2 * ddp["held"] / size


def test_ranks_draw_different_noise(found: dict[int, Found]) -> None:
    """The losses of the two halves of the batch are not those of one half twice."""
    first, second = found[2]["ddp"]["losses"][0].chunk(2)
    assert not torch.allclose(first, second)
    assert found[4]["second moment"]["by t"].sum() > 0


# The command under its launchers


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


def test_stop_and_kill(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank stops all after the same step; SIGKILL of one ends all; what follows is bit for bit the run
    that was never stopped, sharded too."""
    options: dict[str, Any] = {"steps": 100, "save_interval": 10, "log_interval": 50, "parallel": "fsdp"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ended(start_ranks(zygote, *[["train", *train_flags(corpus, whole, **options)]] * 2)) == [0, 0]

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
    assert same(weights_of(parts, "*100.pt"), weights_of(whole, "*100.pt"))


@pytest.mark.slow
def test_torchrun_starts_again(corpus: Path, tmp_path: Path) -> None:
    """A rank that is killed under an elastic torchrun costs what was not saved, and no more: the end is bit for bit that
    of two ranks that nobody has disturbed."""
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


# Mistakes


def refusals(zygote: Zygote, *commands: list[str]) -> list[str]:
    """The errors of ranks that are all refused."""
    ranks = start_ranks(zygote, *commands)
    assert ended(ranks) == [1] * len(commands), [rank.err for rank in ranks]
    assert all("Traceback" not in rank.err for rank in ranks)
    return [line for rank in ranks for line in rank.err.splitlines() if line.startswith("error: ")]


def test_ranks_that_disagree(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    """Said once, by rank 0 for the rank that differs, and nothing is written."""
    folder = tmp_path / "run"
    base = ["train", *train_flags(corpus, folder, steps=2)]
    (error,) = refusals(zygote, base, [*base, "--lr", "0.5"])
    assert "rank 1: expected the same flags on all ranks, found --lr 0.5 beside None on rank 0" in error
    (error,) = refusals(zygote, base, ["train", "--steps", "x"])
    assert "rank 1: argument --steps: invalid int value: 'x'" in error
    assert not folder.exists()


def test_texts_that_differ(zygote: Zygote, tmp_path: Path) -> None:
    """Two hosts have two files under one name."""
    hosts = [tmp_path / f"host{rank}" for rank in range(2)]
    for host, lines in zip(hosts, (LINES, LINES[::-1]), strict=True):
        host.mkdir()
        write_text(host / "text.txt", lines)
    commands = [["in", str(host), "train", *train_flags(Path("text.txt"), tmp_path / "run")] for host in hosts]
    (error,) = refusals(zygote, *commands)
    assert "rank 1: expected the same training text on all ranks, found the lines of text.txt" in error
    assert not (tmp_path / "run").exists()


def test_batch_that_cannot_be_shared(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    (error,) = refusals(zygote, *[["train", *train_flags(corpus, tmp_path / "run", batch_size=10)]] * 2)
    assert "--batch_size must be a multiple of 4 for 2 processes to share it, found 10; the nearest: 8 or 12" in error
    assert not (tmp_path / "run").exists()


def test_port_in_use(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = zygote.start(
            "train", *train_flags(corpus, tmp_path / "run"), SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0",
            SLURM_STEP_NODELIST="127.0.0.1", MASTER_PORT=port, MASTER_ADDR="127.0.0.1",
        )  # fmt: skip
        assert ended([process]) == [1]
    assert f"error: expected port {port} on 127.0.0.1 to be free, found it in use; set MASTER_PORT" in process.err
    assert "Traceback" not in process.err


# One run in a folder


def test_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError, match=rf"found one \(process {os.getpid()} on "):
        FolderLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")  # of a run that was killed
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_second_run_in_a_folder(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    """It is refused while the first is alive, even if that stands still; not after the first was killed."""
    command = ["train", *train_flags(corpus, tmp_path / "run", steps=100_000, save_interval=20)]
    first = zygote.start(*command)
    wait_for(tmp_path / "run" / "opt000020.pt", [first])
    first.send(signal.SIGSTOP)
    second = zygote.start(*command)
    assert ended([second]) == [1]
    assert f"expected no other run at work here, found one (process {first.pid} on" in second.err
    first.send(signal.SIGKILL)
    assert ended([first]) == [-signal.SIGKILL]
    command[command.index("100000")] = "60"
    third = zygote.start(*command)
    assert ended([third]) == [0]
    assert "going on from step" in third.err


def test_refusal_is_said_once() -> None:
    assert Refused("x", said=True).said
    assert str(Refused("x")) == "x"


@pytest.mark.parametrize("command", ["evaluate", "likelihood", "report", "train_classifier"])
def test_what_ranks_do_not_share_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of two processes would do all of it, and write the same files."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    where = "text_diffusion.control.train_classifier" if command == "train_classifier" else f"text_diffusion.{command}"
    given = [str(tmp_path)] * (2 if command == "likelihood" else 1)
    assert importlib.import_module(where).main(given) == 1
    assert f"{command} expects one process, found 2 (torchrun)" in one_sentence(capsys.readouterr().err)


def test_one_process_by_one_account_and_two_by_another() -> None:
    with pytest.raises(UserError, match="unset RANK and WORLD_SIZE"):
        find_place({"RANK": "0", "WORLD_SIZE": "1", "PMI_SIZE": "2"})


def test_ranks_that_disagree_on_what_to_sample(zygote: Zygote, trained: Path, tmp_path: Path) -> None:
    common = ["sample", "--model_name_or_path", str(next(trained.glob("ema*.pt"))), "--out_dir", str(tmp_path / "out")]
    ranks = start_ranks(zygote, [*common, "--num_samples", "4"], [*common, "--num_samples", "8"])
    assert ended(ranks) == [1, 1]
    assert "found --num_samples 8 beside 4" in ranks[0].err + ranks[1].err
    assert not (tmp_path / "out").exists()


def test_stores_that_are_not_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = train_flags(tmp_path / "corpus.txt", Path("run"), steps=1)
    flags[flags.index("run")] = "s3://bucket/run"
    assert train.main(flags) == 1
    assert "s3://bucket/run: expected a path on this machine" in one_sentence(capsys.readouterr().err)
