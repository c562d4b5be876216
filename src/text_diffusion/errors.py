"""How a command ends: every error that a user can cause is one sentence, with an exit status that is not 0."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from text_diffusion.visible import visible


class UserError(ValueError):
    """Something that the user can mend; its message says what was expected, what was found and what to do."""


class Refused(UserError):
    """A UserError that all ranks of a run end with; one of them says it."""

    def __init__(self, message: str, said: bool = False) -> None:
        super().__init__(message)
        self.said = said


class Interrupted(Exception):
    """A signal came, or nobody reads what is shown; the message says what was saved and how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main`` and return its exit status: 0, 1 after an error, 128 + the number after a signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows another; files have it
    try:
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: the reader has gone, so nothing can be said and nothing more is flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, Interrupted, KeyboardInterrupt) as error:
        return say(error)
    except OSError as error:
        if error.filename is not None:
            return _end(
                f"error: {error.filename}: expected a path that can be read or written, found: {error.strerror}", 1
            )
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _end("error: expected room for what is printed, found the disk full", 1)
    return 0


def say(error: BaseException) -> int:
    """Say on standard error why a command ends, unless another rank does; returns the exit status."""
    if isinstance(error, UserError):
        return _end("" if isinstance(error, Refused) and error.said else f"error: {error}", 1)
    if isinstance(error, Interrupted):
        return _end(str(error), 128 + error.number)
    if isinstance(error, KeyboardInterrupt):
        return _end("interrupted", 130)
    return _end("".join(traceback.format_exception(error)).rstrip(), 1)


def _end(message: str, status: int) -> int:
    if message:
        try:
            print("\n".join(map(visible, message.split("\n"))), file=sys.stderr)  # names of files may hold anything
        except BrokenPipeError:  # `... 2>&1 | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return status
