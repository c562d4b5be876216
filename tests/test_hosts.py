"""Two network namespaces as two hosts: ranks that can reach each other over one link only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy import environment, metrics, train_flags, weights_of

from text_diffusion import train
from text_diffusion.route import interface_of, own_address, use_route_to

HOSTS = ("10.231.7.1", "10.231.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two of them, joined by a pair of virtual interfaces, and by nothing to the rest of the world."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (Debian: apt install iproute2)")
    names = [f"td{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "td0", "netns", names[0], "type", "veth", "peer", "name", "td1", "netns", names[1])
        for i, (name, host) in enumerate(zip(names, HOSTS, strict=True)):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", f"td{i}")
            ip("-n", name, "link", "set", f"td{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove(names)
        pytest.skip(f"no network namespaces here: {error}")
    yield names
    remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts(namespaces: list[str], corpus: Path, tmp_path: Path) -> None:
    """torchrun on each, as docs/distributed.md says; only the first sees the folder of the run. The log is that of one
    process."""
    options = {"steps": 4, "log_interval": 1, "eval_interval": 2}
    one, run = tmp_path / "one", tmp_path / "run"
    assert train.main(train_flags(corpus, one, **options)) == 0
    run.mkdir()
    processes = []
    for rank, name in enumerate(namespaces):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += [
            "--node-rank",
            str(rank),
            "--nproc-per-node",
            "1",
            "--master-addr",
            HOSTS[0],
            "--master-port",
            "29511",
        ]
        command += ["-m", "text_diffusion", "train", *train_flags(corpus, run, **options)]
        if rank:
            command[4:4] = [
                "unshare",
                "--mount",
                "sh",
                "-c",
                f'mount -t tmpfs none {tmp_path / "run"} && exec "$@"',
                "-",
            ]
        processes.append(
            subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == f"written the weights to {run / 'ema_0.9_000004.pt'}\n"
    for row, expected in zip(metrics(run), metrics(one), strict=True):
        assert row == pytest.approx(expected | {"world_size": 2}, rel=1e-4, abs=1e-7)
    assert weights_of(run).keys() == weights_of(one).keys()


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are looked up on Linux only")
def test_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
    assert own_address("no such host.invalid") is None
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    use_route_to("127.0.0.1", one_host=False)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    use_route_to("127.0.0.1", one_host=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    use_route_to("127.0.0.1", one_host=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
