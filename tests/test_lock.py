"""One run in a folder at a time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from toy import train_flags
from zygote import Zygote, ended, wait_for

from text_diffusion.errors import UserError
from text_diffusion.lock import FolderLock


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
