"""Sentences in the making in the terminal, by `rich` (extra `viz`)."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from text_diffusion.errors import UserError
from text_diffusion.visual.recording import Frame, Word

PAUSE = 0.15  # seconds a frame


def check() -> None:
    """Find out before the work whether the library is there.

    Raises:
        UserError: it is not.
    """
    try:
        importlib.import_module("rich.live")
    except ImportError:
        raise UserError("--play needs rich, of the extra viz: pip install '.[viz]' in the repository") from None


def play(frames: Sequence[Frame], pause: float = PAUSE) -> None:
    """Show one frame after the other in place; where standard error is no terminal, the last one."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stderr, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        for number, frame in enumerate(frames, 1):
            live.update(text_of(frame, number, len(frames)), refresh=True)
            if console.is_terminal:
                time.sleep(pause)


def text_of(frame: Frame, number: int, count: int) -> Any:
    """A frame as rich text: the surer a word, the brighter; the surest in bold, which is seen without colour too."""
    from rich.text import Text

    text = Text()  # whose own style would be that of every word
    text.append(f"step {number} of {count}  t {frame.t}  {100 * frame.noise:.0f} % noise\n", style="dim")
    for words in frame.noisy:
        for word in words:
            text.append((" " if word.space else "") + word.text, style=_style(word))
        text.append("\n")
    return text


def _style(word: Word) -> str:
    if word.confidence > 0.9:
        return "bold"
    return "" if word.confidence > 0.5 else "dim"
