"""Every flag does something, refuses what it cannot take, and beats what was saved.

The tables name each flag of the commands once: a new flag without a line here fails.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from toy import (
    HAS_BF16,
    LINES,
    SIZES,
    FakeWandb,
    contents,
    files,
    flags,
    metrics,
    one_sentence,
    same,
    train_flags,
    weights_of,
    write_text,
)

from text_diffusion import config, losses, objectives, sample, train
from text_diffusion import tokenizer as tokenizers
from text_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, Options, SampleConfig, TrainConfig
from text_diffusion.errors import UserError
from text_diffusion.generation import TextDiffusion
from text_diffusion.modeling import EncoderLayer, TransformerNetModel
from text_diffusion.objectives import Objective
from text_diffusion.saver import Saver
from text_diffusion.tokenizer import train_word_level

TRAIN_GROUPS: tuple[type[Options], ...] = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig)


def names(*groups: type[Options]) -> list[str]:
    return [f.name for group in groups for f in fields(group)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """A value for a flag, what must change by it, and what has to be set beside it (and in the run compared with)."""

    value: object
    changes: str
    beside: dict[str, Any] = field(default_factory=dict)


# What a training run is seen by


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    """Files that flags may name, for the values in capitals below."""
    vocab = tmp_path / "vocab.json"
    tokenizers.save(train_word_level([*LINES, "more words"]), vocab)
    return {
        "OTHER": write_text(tmp_path / "other.txt", LINES[:40]),
        "PAIRS": write_text(tmp_path / "pairs.tsv", [f"{line.split()[1]}\t{line}" for line in LINES]),
        "HELD_OUT": write_text(tmp_path / "held-out.txt", LINES[:6]),
        "VOCAB": vocab,
        "FOLDER": tmp_path / "elsewhere",
    }


WORDS = {"objective": "cross_entropy", "diffusion_steps": None}  # None: left out
TRAIN_CASES = {
    "objective": Case("autoregressive", "error"),  # of the others set here; what it does is in test_autoregressive
    "in_channel": Case(4, "weights"),
    "hidden_size": Case(32, "weights"),
    "num_layers": Case(2, "weights"),
    "num_heads": Case(4, "weights"),
    "num_channels": Case(4, "weights"),
    "activation": Case("gelu", "weights"),
    "norm": Case("post", "weights"),
    "dropout": Case(0.2, "weights"),
    "self_condition": Case(False, "weights"),
    "output_prior": Case(False, "weights", WORDS),
    "known_words": Case(False, "weights", WORDS),
    "condition": Case("source", "weights", {"train_txt_path": "PAIRS"}),
    "drop_condition": Case(0.5, "weights", {"train_txt_path": "PAIRS", "condition": "source"}),
    "diffusion_steps": Case(10, "weights"),
    "noise_schedule": Case("cosine", "weights"),
    # what is known of each t decides only once each was met ten times
    "schedule_sampler": Case("loss-second-moment", "weights", {"diffusion_steps": 2, "batch_size": 40}),
    "stratified": Case(True, "weights"),
    "dataset": Case("OTHER", "weights"),
    "train_txt_path": Case("OTHER", "weights"),
    "val_txt_path": Case("HELD_OUT", "validation", {"val_txt_path": "OTHER", "eval_interval": 3}),
    "tokenizer": Case("VOCAB", "weights"),
    "sequence_len": Case(10, "weights"),
    "source_len": Case(9, "weights", {"train_txt_path": "PAIRS", "condition": "source"}),
    "long_lines": Case("drop", "weights", {"sequence_len": 6, "train_txt_path": "MIXED"}),
    "steps": Case(5, "names"),
    "batch_size": Case(4, "weights"),
    "microbatch": Case(2, "calls"),
    "lr": Case(1e-2, "weights"),
    "warmup_steps": Case(1, "weights"),
    "weight_decay": Case(0.5, "weights", {"lr": 0.1}),
    "gradient_clipping": Case(0.01, "weights"),
    "ema_rate": Case("0.1,0.99", "names"),
    "seed": Case(1, "weights"),
    "log_interval": Case(1, "metrics"),
    "eval_interval": Case(2, "validation"),
    "save_interval": Case(2, "names"),
    "keep_last": Case(1, "names", {"save_interval": 1}),
    "save_async": Case(False, "waits"),
    "checkpoint_path": Case("FOLDER", "folder"),
    "track": Case("wandb", "logged"),
    "device": Case("mps", "error"),
    "gpu": Case("0", "stderr"),
    "precision": Case("bf16", "weights" if HAS_BF16 else "stderr"),
    "deterministic": Case(True, "deterministic"),
    "gradient_checkpointing": Case(True, "layers"),
    "compile": Case(True, "compiled"),
}


def test_train_table_is_complete() -> None:
    several = ["parallel"]  # which changes nothing for one process: see test_distributed
    assert list(TRAIN_CASES) == [name for name in names(*TRAIN_GROUPS) if name not in several]


def observe_training(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Everything that can be seen of a run from outside, and how often the network was asked and compiled."""
    calls: list[int] = []
    compiled: list[object] = []
    layers: list[int] = []
    deterministic: set[bool] = set()
    waits: list[Saver] = []
    loss = losses.diffusion_lm_loss

    def counted(network: Any, diffusion: Any, input_ids: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(input_ids))
        deterministic.add(torch.are_deterministic_algorithms_enabled())
        return loss(network, diffusion, input_ids, *rest)

    wandb = FakeWandb()
    forward = EncoderLayer.forward

    def layer(self: EncoderLayer, h: torch.Tensor) -> torch.Tensor:
        layers.append(len(h))
        return forward(self, h)

    finish = Saver.finish

    def waiting(self: Saver) -> list[Path]:
        waits.append(self)
        return finish(self)

    def compile(model: torch.nn.Module, **_: object) -> torch.nn.Module:
        compiled.append(model)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        patch.setitem(objectives.OBJECTIVES, "diffusion_lm", Objective(TransformerNetModel, counted, "mse", ()))
        patch.setattr(torch, "compile", compile)
        patch.setattr(EncoderLayer, "forward", layer)
        patch.setattr(Saver, "finish", waiting)
        status = train.main(argv)
    out, err = capsys.readouterr()
    if status:
        return {"error": one_sentence(err)}
    found = next(path for path in (folder, folder.parent / "elsewhere") if path.is_dir())
    return {
        "error": None,
        "folder": found.name,
        "names": sorted(path.name for path in found.iterdir()),
        "weights": weights_of(found, "model*.pt"),
        "metrics": metrics(found),
        "validation": metrics(found, validation=True),
        "calls": calls,
        "compiled": len(compiled),
        "layers": layers,
        "deterministic": deterministic,
        "waits": len(waits),
        "logged": len(wandb.rows),
        "stderr": [line for line in err.splitlines() if not line.startswith("step ")],
        "stdout": out.splitlines()[-1].rpartition("/")[2],
    }


@pytest.mark.parametrize("name", list(TRAIN_CASES))
def test_train_flag_has_an_effect(
    name: str, texts: dict[str, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    texts = texts | {"MIXED": write_text(tmp_path / "mixed.txt", [*LINES, *(line[:12] for line in LINES)])}
    case = TRAIN_CASES[name]
    folder = tmp_path / "run"
    seen = []
    for options in (case.beside, case.beside | {name: case.value}):
        if folder.exists():
            shutil.rmtree(folder)
        named = {key: texts.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
        usual = {"dataset": corpus, "checkpoint_path": folder, "steps": 3, "log_interval": 2}
        argv = flags(**{key: value for key, value in (SIZES | usual | named).items() if value is not None})
        seen.append(observe_training(argv, folder, capsys))
    before, after = seen
    assert not same(before.get(case.changes), after.get(case.changes))
    if case.changes in (
        "metrics",
        "validation",
        "calls",
        "compiled",
        "layers",
        "deterministic",
        "waits",
        "logged",
        "folder",
        "stderr",
    ):
        for part in ("weights", "names", "stdout"):
            if part == "weights" and case.changes == "calls":
                continue  # to the last digit they may differ
            assert same(before[part], after[part]), f"--{name} changes {case.changes}, and only that"
    if case.changes == "error":
        assert name in after["error"]


# What sampling is seen by

SAMPLE_CASES = {
    "model_name_or_path": Case("RAW", "name"),
    "steps": Case(7, "sentences"),
    "sampler": Case("ddim", "sentences"),
    "spacing": Case("log-snr", "sentences", {"steps": 6}),
    "eta": Case(0.5, "sentences", {"sampler": "ddim"}),
    "churn": Case(4.0, "sentences", {"sampler": "heun", "steps": 6}),
    "halt": Case(1, "sentences"),
    "temperature": Case(0.5, "error"),  # of weights without probabilities of words; else see test_cross_entropy
    "num_samples": Case(12, "sentences"),
    "out_dir": Case("FOLDER", "folder"),
    "batch_size": Case(3, "calls"),
    "top_p": Case(0.5, "sentences"),
    "clamp": Case("clamp", "sentences"),
    "clamp_start": Case(4, "sentences", {"clamp": "clamp"}),
    "sequence_len": Case(5, "sentences"),
    "seed": Case(1, "sentences"),
    "format": Case("jsonl", "name"),
    "show": Case(1, "stderr"),
    "tokenizer": Case("VOCAB", "error"),
    "device": Case("mps", "error"),
    "gpu": Case("0", "stderr"),
}


def test_sample_table_is_complete() -> None:
    assert list(SAMPLE_CASES) == names(SampleConfig)


def observe_sampling(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    calls: list[tuple[int, int]] = []
    denoising = TextDiffusion.denoising

    def counted(self: TextDiffusion, start: int, stop: int, **options: Any) -> Iterator[Any]:
        calls.append((start, stop))
        return denoising(self, start, stop, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextDiffusion, "denoising", counted)
        status = sample.main(argv)
    out, err = capsys.readouterr()
    if status:
        return {"error": one_sentence(err)}
    path = Path(out.splitlines()[-1].removeprefix("written the decoded output to "))
    found = {
        "error": None,
        "folder": path.parent,
        "name": path.name,
        "sentences": path.read_text(encoding="utf-8").splitlines(),
        "calls": calls,
        "stderr": err,
    }
    path.unlink()
    return found


@pytest.mark.parametrize("name", list(SAMPLE_CASES))
def test_sample_flag_has_an_effect(
    name: str, texts: dict[str, Path], writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, raw = tmp_path / writer.name, tmp_path / "model000200.pt"
    shutil.copyfile(writer, weights)
    shutil.copyfile(writer.with_name(raw.name), raw)
    texts = texts | {"RAW": raw}
    case = SAMPLE_CASES[name]
    seen = []
    for options in (case.beside, case.beside | {name: case.value}):
        named = {key: texts.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
        argv = flags(**{"model_name_or_path": weights, "num_samples": 20, "show": 2} | named)
        seen.append(observe_sampling(argv, capsys))
    before, after = seen
    assert len(set(before["sentences"])) > 5
    assert not same(before.get(case.changes), after.get(case.changes))
    if case.changes in ("folder", "calls", "stderr"):
        assert after["sentences"] == before["sentences"]
        assert after["name"] == before["name"]
    if case.changes == "error":
        assert name in after["error"]


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
        if get_type_hints(group)[f.name] in (int, float) and f.metadata["low"] == -math.inf
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
    assert config.build(ModelConfig, train.parse(argv)).self_condition is expected


def test_last_of_two_values_counts() -> None:
    assert train.parse(["--steps", "3", "--steps", "4"]) == {"steps": 4}


def test_lists_of_numbers() -> None:
    assert train.parse(["--ema_rate", "0.5,.9, 0.99"]) == {"ema_rate": (0.5, 0.9, 0.99)}
    assert train.parse(["--ema_rate", "0"]) == {"ema_rate": (0.0,)}


def test_flags_that_are_not_given_leave_no_trace() -> None:
    """So that what was saved is not mistaken for contradicted by defaults."""
    assert train.parse([]) == {}
    assert config.build(TrainConfig, {"steps": 5, "unknown": 1}, {"steps": 6}).steps == 6
    assert config.build(TrainConfig, {"lr": 5.0}, {}).lr == 5.0


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
