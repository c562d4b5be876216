"""How a command ends: every error that a user can cause is one sentence, with an exit status that is not 0."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Something that the user can mend; its message says what was expected, what was found and what to do."""


class Interrupted(Exception):
    """SIGINT (Ctrl-C) or SIGTERM came; the message says what was saved and how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's ``main`` and return its exit status: 0, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows another; files have it
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        return _end(f"error: {error}", 1)
    except Interrupted as interruption:
        return _end(str(interruption), 128 + interruption.number)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except BrokenPipeError:  # `... | head`: the reader has gone, so nothing can be said and nothing more is flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _end(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
