"""Processes with the program already imported, as importing torch takes seconds: forked from one that has done so.

`Zygote` is the test's side. On the other side this file is a program that reads orders, a JSON object a line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
HERE = Path(__file__).resolve().parent


@dataclass
class Process:
    """One that was forked; what it says goes to files."""

    zygote: Zygote
    pid: int
    logs: Path

    @property
    def out(self) -> str:
        return self.logs.with_suffix(".out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self.logs.with_suffix(".err").read_text(encoding="utf-8")

    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        status: int | None = self.zygote.ask({"poll": self.pid})
        return status

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


class Zygote:
    """Starts `python -m text_diffusion COMMAND ...` (or a worker of the tests) without importing anything anew."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.count = logs, 0
        env = os.environ | {"PYTHONPATH": f"{HERE.parent / 'src'}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
        env["PYTHONFAULTHANDLER"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *arguments: str, **env: str) -> Process:
        """A command in an environment of its own; `worker` as the first argument is that of `rank_worker`."""
        self.count += 1
        logs = self.logs / f"process{self.count}"
        pid: int = self.ask({"start": arguments, "env": env, "logs": str(logs)})
        return Process(self, pid, logs)

    def ask(self, order: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


class Crashed(AssertionError):
    """A process ended by a segmentation fault, or aborted; with its stack."""


def unless_crashed(work: Callable[[int], T]) -> T:
    """work(0); or, if PyTorch crashes (FSDP2 on CPUs does, see docs/distributed.md), work(1), as a user would go on."""
    try:
        return work(0)
    except Crashed as crash:
        print(crash, file=sys.stderr)
        return work(1)


def ended(processes: list[Process], seconds: float = 300) -> list[int]:
    """Wait for them; their statuses. Those that do not end in time are killed. Raises `Crashed`."""
    deadline = time.monotonic() + seconds
    found: list[int | None] = [None] * len(processes)
    while None in found:
        for i, process in enumerate(processes):
            if found[i] is None:
                found[i] = process.status()
                if found[i] is None and time.monotonic() > deadline:
                    process.send(signal.SIGKILL)
        time.sleep(0.02)
    for status, process in zip(found, processes, strict=True):
        if status in (-signal.SIGSEGV, -signal.SIGABRT):
            raise Crashed(process.err)
    return [status for status in found if status is not None]


def start_ranks(zygote: Zygote, *commands: list[str], **env: str) -> list[Process]:
    """Start a rank for each command, as torchrun would."""
    env |= {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        zygote.start(*command, RANK=str(rank), LOCAL_RANK=str(rank), **env) for rank, command in enumerate(commands)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(path: Path, processes: list[Process], seconds: float = 300) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        assert all(process.status() is None for process in processes), [process.err for process in processes]
        time.sleep(0.02)


def use_store(port: int) -> None:
    """Lead the connections to object stores to a server of the tests."""
    from stores import Pool

    from text_diffusion import remote

    remote.get_http_pool = lambda: Pool(port)


def main() -> None:
    """Take orders until there are no more."""
    import torch._dynamo  # noqa: F401  # which AdamW loads, a second for each child
    from rank_worker import main as worker

    from text_diffusion import train  # noqa: F401  # for the children
    from text_diffusion.__main__ import main as command

    statuses: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid = order["poll"]
            if pid not in statuses and (reaped := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(reaped[1])
            answer = statuses.get(pid)
        else:
            answer = os.fork()
            if not answer:
                status = 1
                try:
                    for number, suffix in ((1, ".out"), (2, ".err")):
                        os.dup2(os.open(order["logs"] + suffix, os.O_WRONLY | os.O_CREAT), number)
                    os.environ.update(order["env"])
                    if "STORE_PORT" in os.environ:
                        use_store(int(os.environ["STORE_PORT"]))
                    name, *arguments = order["start"]
                    if name == "in":  # a folder
                        os.chdir(arguments[0])
                        _, name, *arguments = arguments
                    status = worker(arguments) if name == "worker" else command([name, *arguments])
                except BaseException as error:
                    sys.excepthook(type(error), error, error.__traceback__)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
