"""Reading text with clear errors, writing files whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from text_diffusion.errors import UserError

SOURCE_ROOT = Path(__file__).resolve().parents[2]


def project_root() -> Path:
    """The clone that holds data/ and ckpts/, or the working directory when the package is installed elsewhere."""
    return SOURCE_ROOT if (SOURCE_ROOT / "scripts" / "run_train.sh").is_file() else Path.cwd()


def read_lines(path: Path, blank: bool = False) -> list[str]:
    """The lines of a UTF-8 text, without line ends, trailing white space and byte-order mark.

    Only a newline ends a line: tabs, quotes and the rest of Unicode are text. Blank lines are kept if `blank` says so.

    Raises:
        UserError: the file is missing, unreadable, empty, binary or not UTF-8.
    """
    lines = _all_lines(path)
    if not blank or not any(lines):
        lines = [line for line in lines if line]
    if not lines:
        found = "only blank lines" if path.stat().st_size else "an empty file"
        raise UserError(f"{path}: expected sentences, one a line, found {found}")
    return lines


def where(path: Path, line: str) -> str:
    """Where a line that `read_lines` gave stands: "in line 5", counted as an editor does; or how it begins.

    (Of a dataset of two files a line may be in the other.)
    """
    lines = _all_lines(path)
    columns = ["\t".join(part.strip() for part in other.split("\t")) for other in lines]  # those of two columns
    numbers = (number for number, both in enumerate(zip(lines, columns, strict=True), 1) if line in both)
    number = next(numbers, None)
    return f"in line {number}" if number else repr(line if len(line) <= 40 else f"{line[:40]}...")


def _all_lines(path: Path) -> list[str]:
    """Blank ones too. Where there is no newline at all a carriage return ends a line, as on the first Macintoshes."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a text file, one sentence a line, found: {error.strerror}") from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: expected UTF-8, found UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 does that)")
    if b"\0" in raw:
        raise UserError(f"{path}: expected text, found a binary file (a zero byte at offset {raw.index(0)})")
    end = "\n" if b"\n" in raw else "\r"
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(end.encode(), 0, error.start) + 1
        raise UserError(f"{path}: expected UTF-8, found byte 0x{raw[error.start]:02x} in line {number}") from None
    return [line.rstrip() for line in text.removesuffix(end).split(end)]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name in the same folder, flush it to disk, then rename it.

    Raises:
        UserError: it cannot be written (no such folder, no permission, no space); nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb", buffering=0) as raw:
            file = _Whole(raw)
            try:
                write(cast(IO[bytes], file))
            except RuntimeError as error:  # how torch.save reports a full disk, without saying so
                raise file.error or error from None
            os.fsync(raw.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class _Whole(io.RawIOBase):
    """A file that takes all that is written, or remembers why it did not."""

    def __init__(self, raw: io.FileIO) -> None:
        self.raw = raw
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """All of it."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self.raw.write(left) :]
        except OSError as error:
            self.error = error
            raise
        return size


def _sync_folder(folder: Path) -> None:
    """Have the new name of a file on disk, too, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that knows no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `write_atomically` whose process was killed in the middle."""
    for path in folder.glob(".*.tmp"):
        name = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if name and not _is_alive(int(name[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def check_writable(folder: Path) -> None:
    """Find out now, not after the work, whether files can be written to a folder; makes it if it is missing.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        found = "a file" if folder.exists() and not folder.is_dir() else f"none: {error.strerror}"
        raise UserError(f"{folder}: expected a folder to write to, found {found}") from None
