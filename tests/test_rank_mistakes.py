"""What several ranks are refused: said once, before any work, and nothing is written."""

from __future__ import annotations

import socket
from pathlib import Path

from toy import LINES, train_flags, write_text
from zygote import Zygote, ended, start_ranks


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


def test_shards_without_a_folder_that_all_hosts_share(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    hosts = [tmp_path / f"host{rank}" for rank in range(2)]
    for host in hosts:
        host.mkdir()
    flags = train_flags(corpus, Path("run"), parallel="fsdp")
    (error,) = refusals(zygote, *[["in", str(host), "train", *flags] for host in hosts])
    assert "rank 1: every rank reads and writes its shards (--parallel fsdp) and expects run to be one folder" in error
    assert not (hosts[1] / "run").exists()
    assert not list((hosts[0] / "run").glob("*.pt"))
    assert not (hosts[0] / "run" / ".lock").exists()


def test_batch_that_cannot_be_shared(zygote: Zygote, corpus: Path, tmp_path: Path) -> None:
    (error,) = refusals(zygote, *[["train", *train_flags(corpus, tmp_path / "run", batch_size=10)]] * 2)
    assert "--batch_size must be a multiple of 4 for 2 processes to share it, found 10; the nearest: 8 or 12" in error
    assert not (tmp_path / "run").exists()


def test_ranks_that_disagree_on_what_to_sample(zygote: Zygote, trained: Path, tmp_path: Path) -> None:
    common = ["sample", "--model_name_or_path", str(next(trained.glob("ema*.pt"))), "--out_dir", str(tmp_path / "out")]
    ranks = start_ranks(zygote, [*common, "--num_samples", "4"], [*common, "--num_samples", "8"])
    assert ended(ranks) == [1, 1]
    assert "found --num_samples 8 beside 4" in ranks[0].err + ranks[1].err
    assert not (tmp_path / "out").exists()


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
