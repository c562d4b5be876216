"""Values that a flag refuses, names that are not guessed, and which of two values counts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from toy import (
    SIZES,
    TRAIN_GROUPS,
    contents,
    files,
    flags,
    names,
    one_sentence,
    train_flags,
)

from text_diffusion import sample, train
from text_diffusion.config import ModelConfig, SampleConfig, TrainConfig
from text_diffusion.errors import UserError
from text_diffusion.flags import Options, build

# Values that will not do


def bad_values(group: type[Options]) -> Iterator[tuple[str, str]]:
    """For each flag of a group what its type, its range and its choices exclude."""
    types = get_type_hints(group)
    for f in fields(group):  # type: ignore[arg-type]
        kind, low, high = types[f.name], f.metadata["low"], f.metadata["high"]
        if kind in (int, float, tuple[float, ...]):
            yield f.name, "x"
            yield f.name, ""
            step = 1 if kind is int else 0.001
            if low > -math.inf:
                yield f.name, str(low - step)
            if f.metadata["above"] > -math.inf:
                yield f.name, str(kind(f.metadata["above"]))
            if high < math.inf:
                yield f.name, str(high + step)
        if kind is int:
            yield f.name, "1.5"
        if kind in (float, tuple[float, ...]):
            yield f.name, "nan"
            yield f.name, "inf"
        if kind == tuple[float, ...]:
            yield f.name, "0.5,x"
            yield f.name, f"0.5,{high + 1}"
            yield f.name, "0.5,"
        if kind is bool:
            yield f.name, "maybe"
            yield f.name, ""
        if f.metadata["choices"]:
            yield f.name, "nonsense"
            yield f.name, ""


TRAIN_BAD = [pair for group in TRAIN_GROUPS for pair in bad_values(group)]
SAMPLE_BAD = list(bad_values(SampleConfig))


def test_bounds_are_where_they_should_be() -> None:
    """Numbers that have no bound are found out by somebody else; this is the list of them."""
    unbounded = [
        f.name
        for group in (*TRAIN_GROUPS, SampleConfig)
        for f in fields(group)
        if get_type_hints(group)[f.name] in (int, float) and max(f.metadata["low"], f.metadata["above"]) == -math.inf
    ]
    assert unbounded == ["steps"], "sampling's, which depends on the weights file"
    assert len(TRAIN_BAD) > 80
    assert len(SAMPLE_BAD) > 25


@pytest.mark.parametrize(("name", "value"), TRAIN_BAD)
def test_train_refuses(name: str, value: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(train_flags(corpus, tmp_path / "run", **{"steps": 1} | {name: value})) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--{name}" in one_sentence(err)
    assert value.split(",")[-1] in err
    assert files(tmp_path) == {}


@pytest.mark.parametrize(("name", "value"), SAMPLE_BAD)
def test_sample_refuses(
    name: str, value: str, writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(**{"model_name_or_path": writer, "out_dir": tmp_path / "out"} | {name: value})
    assert sample.main(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--{name}" in one_sentence(err)
    assert value in err
    assert files(tmp_path) == {}


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_infinite_is_called_so(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(flags(lr=value)) == 1
    assert "finite" in one_sentence(capsys.readouterr().err)


# Names of flags


@pytest.mark.parametrize("flag", ["--step", "--batch", "--hidden", "--learning_rate", "--Steps", "-steps", "stray"])
def test_names_are_neither_abbreviated_nor_guessed(
    flag: str, corpus: Path, tmp_path: Path, writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, argv in (
        (train.main, train_flags(corpus, tmp_path / "run")),
        (sample.main, flags(model_name_or_path=writer, out_dir=tmp_path / "out")),
    ):
        assert main([*argv, flag, "1"]) == 1
        error = one_sentence(capsys.readouterr().err)
        assert "unrecognized arguments" in error
        assert flag in error
        assert "--help lists the flags" in error
    assert files(tmp_path) == {}


def test_flag_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--steps"]) == 1
    assert "argument --steps: expected one argument" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("main", [train.main, sample.main])
def test_help_has_every_flag(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """With its default."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    groups = TRAIN_GROUPS if main is train.main else (SampleConfig,)
    for name in names(*groups):
        assert f"--{name} " in out
    for default in ("(default 50)", "(default no_clamp)") if main is sample.main else ("(default 0.9999)", "99.9 %"):
        assert default in " ".join(out.split())


# Which value counts


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True),
        (["--self_condition"], True),
        (["--self_condition", "True"], True),
        (["--self_condition", "true"], True),
        (["--self_condition", "1"], True),
        (["--self_condition", "yes"], True),
        (["--self_condition", "False"], False),
        (["--self_condition", "FALSE"], False),
        (["--self_condition=0"], False),
        (["--self_condition", "no"], False),
        (["--self_condition", "False", "--self_condition"], True),
    ],
)
def test_booleans(argv: list[str], expected: bool) -> None:
    assert build(ModelConfig, train.parse(argv)).self_condition is expected


def test_last_of_two_values_counts() -> None:
    assert train.parse(["--steps", "3", "--steps", "4"]) == {"steps": 4}


def test_lists_of_numbers() -> None:
    assert train.parse(["--ema_rate", "0.5,.9, 0.99"]) == {"ema_rate": (0.5, 0.9, 0.99)}
    assert train.parse(["--ema_rate", "0"]) == {"ema_rate": (0.0,)}


def test_flags_that_are_not_given_leave_no_trace() -> None:
    """So that what was saved is not mistaken for contradicted by defaults."""
    assert train.parse([]) == {}
    assert build(TrainConfig, {"steps": 5, "unknown": 1}, {"steps": 6}).steps == 6
    assert build(TrainConfig, {"lr": 5.0}, {}).lr == 5.0


def test_command_line_beats_what_was_saved(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Of the flags that a run may change, each that is given counts, each that is not stays."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    given = {"steps": 8, "lr": 0.5, "save_interval": 7, "log_interval": 1, "gradient_clipping": 2.0}
    assert train.main(flags(checkpoint_path=folder, **given)) == 0
    settings = contents(folder / "opt000008.pt")["settings"]
    assert settings["train"] == contents(folder / "opt000006.pt")["settings"]["train"] | given | {
        "checkpoint_path": str(folder)
    }
    for group in ("model", "diffusion", "data"):
        assert settings[group] == contents(folder / "opt000006.pt")["settings"][group]
    assert (folder / "opt000007.pt").is_file()


@pytest.mark.parametrize("group", [*TRAIN_GROUPS, SampleConfig])
def test_defaults_are_allowed(group: type[Options]) -> None:
    """And every setting says what it is for."""
    group()
    for f in fields(group):  # type: ignore[arg-type]
        assert f.metadata["help"]
        assert f.default is not None


def test_settings_built_in_code_are_checked_too() -> None:
    with pytest.raises(UserError, match=r"--dropout must be between 0 and 0\.95, found 1\.0"):
        ModelConfig(dropout=1.0)
    with pytest.raises(UserError, match="--norm must be one of pre, post, found 'none'"):
        ModelConfig(norm="none")
    assert ModelConfig(**{name: SIZES[name] for name in names(ModelConfig) if name in SIZES}).hidden_size == 16
