"""The controls on the command line of `sample`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from text_diffusion.control.classifier import Classifier, Label, beside, load
from text_diffusion.control.controls import Avoid, Control, Edit, Length, Plan, Template, Want
from text_diffusion.control.given import Labelled, Sources
from text_diffusion.control.steering import InnerSteps
from text_diffusion.errors import UserError
from text_diffusion.files import read_lines
from text_diffusion.flags import Options, option
from text_diffusion.remote import local

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
    edit_strength: float = option(0.5, "with --edit: how much noise it gets, 1 being all", above=0.0, high=1.0)
    label: str = option("", "of the model's own, or of a classifier: then a,b is of two, and a|b either")
    guidance_scale: float = option(
        1.0, "with a label or sources of the model's own: classifier-free guidance; 1: none", low=0.0
    )
    source_file: str = option("", "file of sources, one a line, to write for (--condition source)")
    mbr: int = option(0, "with --source_file: of so many candidates take the one nearest to the others, by BLEU", low=0)
    classifier: str = option("", "from control.train_classifier (default: beside the weights file); of two labels: a,b")
    guidance_strength: float = option(2.5, "with --label: factor of the gradient of log p(label)", above=0.0)
    guidance_range: str = option("", "with --label: guide only at t within LOW-HIGH (default: wherever it helps)")
    inner_steps: int = option(
        0, "with --label: Diffusion-LM's update, so many steps on each x_t; 0: one exact step on x_0", low=0
    )
    inner_lr: float = option(0.1, "with --inner_steps: step size", above=0.0)
    langevin: bool = option(False, "with --inner_steps: Langevin steps instead of Adagrad's (--sampler ancestral)")

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {f.name: f.default for f in fields(self)}
        for name in ("classifier", "guidance_strength", "guidance_range", "inner_steps"):
            if getattr(self, name) != defaults[name] and not self.label:
                raise UserError(f"--{name} is about guidance to a label, so it expects --label, found none")
        if self.guidance_scale != 1 and not (self.label or self.source_file):
            raise UserError("--guidance_scale is about what the model is given: it expects --label or --source_file")
        if self.mbr and not self.source_file:
            raise UserError("--mbr is about candidates for a source, so it expects --source_file, found none")
        if self.mbr == 1:
            raise UserError("--mbr must be at least 2 candidates, found 1")
        if self.source_file and self.template_file:
            raise UserError("--source_file and --template_file exclude each other; leave one out")
        for name in ("inner_lr", "langevin"):
            if getattr(self, name) != defaults[name] and not self.inner_steps:
                raise UserError(f"--{name} is about inner steps, so it expects --inner_steps, found none")
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
        lines = read_lines(local(self.template_file)) if self.template_file else [self.template]
        for line in lines:
            yield [Template(line, self.allow_unk)] if line else []

    def labels(self, model: TextDiffusion, weights: Path) -> list[Control]:
        """Labels: the first is the model's own, if it has labels and no classifier is named for it.

        Raises:
            UserError: a classifier or a label will not do.
        """
        if not self.label:
            return []
        paths = self.classifier.split(",") if self.classifier else []
        labels = [self.label] if self.label in model.labels and not paths else self.label.split(",")
        has_own = bool(model.labels) and len(paths) == len(labels) - 1
        if not has_own and self.guidance_scale != 1 and not self.source_file:
            other = "a classifier for each label" if model.labels else "a model without labels"
            raise UserError(f"--guidance_scale is about a label of the model's own (--condition labels), found {other}")
        found: list[Control] = [Labelled(labels.pop(0), self.guidance_scale)] if has_own else []
        if not labels:
            for name in ("guidance_strength", "guidance_range", "inner_steps"):
                if getattr(self, name) != getattr(ControlConfig, name):
                    raise UserError(f"--{name} is about a classifier, and the label is the model's own: leave it out")
            return found
        return found + self._by_classifiers(labels, paths or [str(beside(weights))], model)

    def _by_classifiers(self, labels: list[str], paths: list[str], model: TextDiffusion) -> list[Control]:
        classifiers = {path: load(local(path), model) for path in paths}
        if len(paths) == 1 and self.label in classifiers[paths[0]].labels:
            labels = [self.label]  # one with a comma in it
        if len(paths) != len(labels):
            raise UserError(
                f"--label and --classifier must name equally many, found {len(labels)} and {len(paths)} "
                "(a,b is a label of each of two classifiers, a|b either label of one)"
            )
        match = re.fullmatch(r"(\d+)-(\d+)", self.guidance_range) if self.guidance_range else None
        if self.guidance_range and not match:
            raise UserError(f"--guidance_range must be two timesteps such as 100-1500, found {self.guidance_range!r}")
        low, high = (int(match[1]), int(match[2])) if match else (0, None)
        found: list[Control] = [
            Label(classifiers[path], _either(label, classifiers[path]), self.guidance_strength, low, high)
            for path, label in zip(paths, labels, strict=True)
        ]
        return found + ([InnerSteps(self.inner_steps, self.inner_lr, self.langevin)] if self.inner_steps else [])

    def sources(self, each: int) -> list[Sources]:
        """The sources, `each` sentences to be written for each, as a list of one; or an empty list.

        Raises:
            UserError: the file cannot be read, or a line is no source.
        """
        if not self.source_file:
            return []
        lines = read_lines(local(self.source_file), blank=True)
        for number, line in enumerate(lines, 1):
            if not line.strip() or "\t" in line:
                found = "a tab" if line.strip() else "an empty line"
                raise UserError(f"{self.source_file}: expected a source without a tab in line {number}, found {found}")
        return [Sources(tuple(line.strip() for line in lines), each, self.guidance_scale, self.source_file)]

    def own(self, each: int) -> list[Labelled | Sources]:
        """What a model that writes left to right is given.

        Raises:
            UserError: see `sources`.
        """
        return [*([Labelled(self.label, self.guidance_scale)] if self.label else []), *self.sources(each)]

    def plans(self, model: TextDiffusion, weights: Path, sequence_len: int, each: int = 1) -> list[Plan]:
        """A plan for each template, or one plan; every one is checked before anything is sampled.

        Args:
            model: writes.
            weights: its file.
            sequence_len: L; 0: the model's.
            each: sentences for a source.

        Raises:
            UserError: the controls contradict each other, or the model cannot meet them.
        """
        others = [*self.controls(), *self.labels(model, weights), *self.sources(each)]
        return [model.plan([*template, *others], sequence_len or None) for template in self.templates()]


def _place(text: str) -> tuple[str, int | None]:
    """A word and its number, "green@2", or a word alone."""
    match = re.fullmatch(r"(.+)@(\d+)", text.strip())
    return (match[1], int(match[2])) if match else (text.strip(), None)


def _either(label: str, classifier: Classifier) -> tuple[str, ...]:
    """The labels of which any will do; one with a bar in its name is itself."""
    return (label,) if label in classifier.labels else tuple(label.split("|"))
