"""Sentences in the making, on standard error: in place on a terminal, a few stages one after the other elsewhere."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm.utils import disp_trim

from text_diffusion.generation import TextDiffusion
from text_diffusion.samplers import Step
from text_diffusion.visible import visible

STAGES = 8
USUAL_COLUMNS = 80
CLEAR_LINE, UP = "\x1b[2K", "\x1b[{}A"


class Display:
    """Shows the first `count` sentences of a batch: x_t rounded to words while noise is left, at the end x_0.

    Args:
        model: decodes.
        count: sentences to show; 0 shows nothing.
        steps: network calls of a sample.
        bar: progress bar to write above.
    """

    def __init__(self, model: TextDiffusion, count: int, steps: int, bar: Any) -> None:
        self.model, self.count, self.steps, self.bar = model, count, steps, bar
        self.done = 0
        self.in_place = sys.stderr.isatty()
        every = max(steps // STAGES, 1)
        self.stages = {steps - every * i for i in range(STAGES)}

    def show(self, step: Step) -> None:
        """Take in the next step of the sampler."""
        self.done += 1
        last = self.done == self.steps
        if not self.count or not (self.in_place or last or self.done in self.stages or self.done == 1):
            return
        x = step.pred_xstart if last else step.x_t
        lines = [visible(line) for line in self.model.decode(x[: self.count], whole=not last)]
        if not self.in_place:
            print("\n".join(f"t {step.t:>5}  {line}" for line in lines), file=sys.stderr)
            return
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_COLUMNS  # some terminals say 0
        lines = [disp_trim(line, max(columns - 12, 1)) for line in lines]
        self.bar.clear()
        back = UP.format(self.count) if self.done > 1 else ""
        sys.stderr.write(back + "".join(f"{CLEAR_LINE}t {step.t:>5}  {line}\n" for line in lines))
        sys.stderr.flush()
