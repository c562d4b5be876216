"""What a model that was trained with labels or sources (`--condition`) writes for; see `condition`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from text_diffusion.autoregressive import Autoregressive
from text_diffusion.condition import Given
from text_diffusion.encoding import encode_sources
from text_diffusion.errors import UserError

if TYPE_CHECKING:
    from text_diffusion.generation import Writer


@dataclass(frozen=True)
class Labelled:
    """Sentences of a label that the model was trained with.

    Args:
        label: one of them.
        scale: of the guidance; 1 is p(w | label) as it was learned, more makes the label count for more.
    """

    label: str
    scale: float = 1.0


@dataclass(frozen=True)
class Sources:
    """Sentences for sources: `each` of them for the first one, then as many for the second, and so on.

    Args:
        texts: the sources.
        each: see above.
        scale: of the guidance; 1 is p(w | source) as it was learned.
        where: they come from, for messages.
    """

    texts: tuple[str, ...]
    each: int = 1
    scale: float = 1.0
    where: str = "the sources"


def needed_by(writer: Writer) -> str:
    """The flag without which a model cannot write, as it has never been given nothing; or an empty string."""
    config = writer.model.config
    if config.condition == "none" or config.drop_condition > 0:
        return ""
    return "--label" if config.condition == "labels" else "--source_file"


def given_of(controls: Sequence[object], writer: Writer) -> Given | None:
    """What the controls give a model, checked against what it was trained with.

    Raises:
        UserError: it was trained with something else, or does not know the label.
    """
    found = [control for control in controls if isinstance(control, Labelled | Sources)]
    config = writer.model.config
    if len(found) > 1:
        raise UserError("one label of the model's own, or one set of sources, is expected, found several")
    if not found:
        if needed := needed_by(writer):
            raise UserError(f"a model that was trained with --drop_condition 0 expects {needed}, found none")
        return None
    control = found[0]
    wanted, flag = ("labels", "--label") if isinstance(control, Labelled) else ("source", "--source_file")
    if config.condition != wanted:
        raise UserError(
            f"{flag} expects a model that was trained with --condition {wanted}, found one with {config.condition}"
        )
    if control.scale != 1 and config.drop_condition == 0:
        raise UserError("--guidance_scale expects a model that was trained with --drop_condition above 0, found 0")
    if control.scale != 1 and isinstance(writer, Autoregressive):
        raise UserError("--guidance_scale belongs to diffusion models: leave it out")
    if not control.scale >= 0:
        raise UserError(f"--guidance_scale must be at least 0, found {control.scale:g}")
    device = writer.model.condition.weight.device
    if isinstance(control, Labelled):
        if control.label not in writer.labels:
            known = ", ".join(writer.labels)
            raise UserError(f"--label must be one that the model was trained with: {known}; found {control.label!r}")
        return Given(torch.tensor([writer.labels.index(control.label)], device=device), scale=control.scale)
    if not control.texts or control.each < 1:
        raise UserError(f"sources and at least 1 sentence for each are expected, found {len(control.texts)}")
    ids = encode_sources(list(control.texts), len(writer.model.condition.weight), writer.tokenizer, control.where)
    unknown = writer.tokenizer.unknown_share(writer.tokenizer.encode(control.texts))
    if unknown > 0.01:
        print(f"warning: {unknown:.1%} of the words of {control.where} are unknown to the model", file=sys.stderr)
    return Given(ids.to(device), control.each, control.scale)
