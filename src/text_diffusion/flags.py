"""Flags of the command line that are made of settings: a setting is a field of a dataclass, a flag says its name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from typing import Any, NoReturn, TypeVar, get_type_hints

from text_diffusion.errors import UserError

T = TypeVar("T", bound="Options")


def option(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field that is also a flag: from `low` to `high`, and above `above`."""
    limits = {"low": low, "high": high, "above": above, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, **limits})


class Options:
    """Base of all settings (`config`): checks ranges and choices when built."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, limits = getattr(self, f.name), f.metadata
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"--{f.name} must be a finite number, found {number}")
                if isinstance(number, (int, float)) and not (
                    limits["low"] <= number <= limits["high"] and number > limits["above"]
                ):
                    expected = _range(limits["low"], limits["high"], limits["above"])
                    raise UserError(f"--{f.name} must be {expected}, found {number}")
            if limits["choices"] and value not in limits["choices"]:
                raise UserError(f"--{f.name} must be one of {', '.join(limits['choices'])}, found {value!r}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and whose flags are never abbreviated."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def add_options(parser: argparse.ArgumentParser, *groups: type[Options]) -> None:
    """A flag for each field of the groups; flags that are not given leave no trace in the namespace."""
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or "").splitlines()[0].rstrip("."))
        types = get_type_hints(group)
        for f in fields(group):  # type: ignore[arg-type]
            default = "" if f.default in ("", MISSING) else f" (default {shown(f.default)})"
            section.add_argument(
                f"--{f.name}",
                type=_CONVERTERS[types[f.name]],
                default=argparse.SUPPRESS,
                choices=f.metadata["choices"] or None,
                nargs="?" if types[f.name] is bool else None,
                const=True if types[f.name] is bool else None,
                metavar=None if f.metadata["choices"] else _METAVARS.get(types[f.name]),
                help=(f.metadata["help"] + default).replace("%", "%%"),
            )


def build(group: type[T], *sources: dict[str, Any]) -> T:
    """Settings from dictionaries, later ones first in rank; names that are not the group's are passed over."""
    names = {f.name for f in fields(group)}  # type: ignore[arg-type]
    merged = {name: value for source in sources for name, value in source.items() if name in names}
    return group(**merged)


def _boolean(text: str) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return words[text.lower()]


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, found {text!r}") from None


_CONVERTERS: dict[Any, Any] = {int: int, float: float, str: str, bool: _boolean, tuple[float, ...]: _floats}
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", bool: "BOOL", tuple[float, ...]: "FLOAT,..."}


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _range(low: float, high: float, above: float) -> str:
    if above > -math.inf:
        return f"above {above:g}" + ("" if high == math.inf else f" and at most {high:g}")
    if high == math.inf:
        return f"at least {low:g}"
    return f"between {low:g} and {high:g}"
