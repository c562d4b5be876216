"""One run in a folder at a time: a lock that a dead process does not leave behind, as the system holds it.

By its file the other ranks of the run see whether the folder is theirs too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

from text_diffusion.distributed import Ranks
from text_diffusion.errors import UserError

NAME = ".lock"
PATIENCE = 5  # seconds, until what one host writes to a file system is seen by the others


class FolderLock:
    """Held from when it is made until it is released or the process ends, however it ends.

    Args:
        folder: which must exist.

    Raises:
        UserError: another process holds it; the file says which.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.file = self._take()

    def _take(self) -> int | None:
        try:
            import fcntl
        except ImportError:  # Windows
            return None
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 1000).decode(errors="replace").strip() or "it is starting"
                os.close(file)
                raise UserError(
                    f"{self.path.parent}: expected no other run at work here, found one ({holder}); wait for its end "
                    "or stop it, or give --checkpoint_path another folder"
                ) from None
            except OSError as error:  # a file system without locks
                print(f"warning: {self.path.parent} cannot be locked ({error.strerror})", file=sys.stderr)
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), self.path.stat()):
                    self._sign(file)
                    return file
            os.close(file)  # its holder removed it between our opening and locking it

    def _sign(self, file: int) -> None:
        try:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            self.path.unlink(missing_ok=True)
            os.close(file)
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def release(self) -> None:
        """Let others in."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self.file)
            self.file = None

    def __del__(self) -> None:
        if getattr(self, "file", None) is not None:  # it is missing where the lock was refused
            os.close(self.file)  # type: ignore[arg-type]


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Find out whether all ranks see the folder that rank 0 has locked.

    Raises:
        UserError: the folder of that name is another one on another host.
    """
    path = folder / NAME
    holder = ranks.on_first(lambda: path.read_text() if path.is_file() else None)
    if holder is None:  # Windows, where all are on one host
        return

    def check() -> None:
        deadline = time.monotonic() + PATIENCE
        while not path.is_file() or path.read_text() != holder:
            if time.monotonic() > deadline:
                raise UserError(
                    f"every rank reads and writes its shards (--parallel fsdp) and expects {folder} to be one folder "
                    f"on all hosts, found another on {socket.gethostname()}; take one they share, or --parallel ddp"
                )
            time.sleep(0.1)

    ranks.together(check)
