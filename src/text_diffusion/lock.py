"""One run in a folder at a time: a lock that a dead process does not leave behind, as the system holds it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

from text_diffusion.errors import UserError

NAME = ".lock"


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
