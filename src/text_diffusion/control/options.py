"""The controls on the command line of `sample`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from text_diffusion.config import Options, option
from text_diffusion.control.controls import Avoid, Control, Edit, Length, Plan, Template, Want
from text_diffusion.errors import UserError
from text_diffusion.files import read_lines

if TYPE_CHECKING:
    from text_diffusion.generation import TextDiffusion


@dataclass(frozen=True)
class ControlConfig(Options):
    """Steering (`control`): what the sentences must be like."""

    template: str = option("", 'known words and gaps: "The [GAP] is [GAP:2]."; [GAP:1-3]: one to three words')
    template_file: str = option("", "file of templates, one a line; num_samples sentences of each, in order")
    allow_unk: bool = option(False, "a template may have words that the model does not know")
    length: str = option("", "number of words, as white space separates them, or a range such as 5-8")
    want: str = option("", "words that must occur, separated by commas; green@2: as the second word")
    avoid: str = option("", "words that must not occur, separated by commas; green@2: not as the second word")
    edit: str = option("", "a sentence to start from, instead of noise alone")
    edit_strength: float = option(0.5, "with --edit: how much noise it gets, 1 being all", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template and self.template_file:
            raise UserError("--template and --template_file exclude each other; put all templates into the file")
        if self.allow_unk and not (self.template or self.template_file):
            raise UserError("--allow_unk is about the words of a template, so it expects --template, found none")
        if self.edit_strength != 0.5 and not self.edit:
            raise UserError("--edit_strength is about a sentence to start from, so it expects --edit, found none")

    def controls(self) -> list[Control]:
        """All but the templates.

        Raises:
            UserError: a value is malformed.
        """
        found: list[Control] = []
        if self.length:
            match = re.fullmatch(r"(\d+)(-(\d*))?", self.length)
            if not match:
                raise UserError(f"--length must be a number of words, or a range such as 4-7, found {self.length!r}")
            low = int(match[1])
            found.append(Length(low, low if match[2] is None else int(match[3]) if match[3] else None))
        found += [Want(*_place(text)) for text in self.want.split(",") if self.want]
        found += [Avoid(*_place(text)) for text in self.avoid.split(",") if self.avoid]
        if self.edit:
            found.append(Edit(self.edit, self.edit_strength))
        return found

    def templates(self) -> Iterator[list[Control]]:
        """Each template as a list of one, or a single empty list without any.

        Raises:
            UserError: the file cannot be read.
        """
        lines = read_lines(Path(self.template_file)) if self.template_file else [self.template]
        for line in lines:
            yield [Template(line, self.allow_unk)] if line else []

    def plans(self, model: TextDiffusion, sequence_len: int) -> list[Plan]:
        """A plan for each template, or one plan; every one is checked before anything is sampled.

        Raises:
            UserError: the controls contradict each other, or the model cannot meet them.
        """
        others = self.controls()
        return [model.plan([*template, *others], sequence_len or None) for template in self.templates()]


def _place(text: str) -> tuple[str, int | None]:
    """A word and its number, "green@2", or a word alone."""
    match = re.fullmatch(r"(.+)@(\d+)", text.strip())
    return (match[1], int(match[2])) if match else (text.strip(), None)
