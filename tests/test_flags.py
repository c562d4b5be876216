"""Every flag has an effect on what one sees."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from berts import save_bert
from toy import (
    HAS_BF16,
    LINES,
    SIZES,
    TRAIN_GROUPS,
    FakeWandb,
    flags,
    metrics,
    names,
    one_sentence,
    same,
    weights_of,
    write_text,
)

from text_diffusion import objectives, sample, train
from text_diffusion import tokenizer as tokenizers
from text_diffusion.config import SampleConfig
from text_diffusion.generation import TextDiffusion
from text_diffusion.modeling import EncoderLayer
from text_diffusion.saver import Saver
from text_diffusion.tokenizer import train_word_level


@dataclass(frozen=True)
class Case:
    """A value for a flag, what must change by it, and what has to be set beside it (and in the run compared with)."""

    value: object
    changes: str
    beside: dict[str, Any] = field(default_factory=dict)


# What a training run is seen by


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("berts")
    return {name: save_bert(folder / name, seed=seed) for seed, name in enumerate(("BERT", "OTHER_BERT"))}


@pytest.fixture(scope="module")
def teachers(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(("TEACHER", "OTHER_TEACHER")):
        folder = tmp_path_factory.mktemp("teachers") / name
        options = {name: value for name, value in {**SIZES, **WORDS}.items() if value is not None}
        assert train.main(flags(dataset=corpus, checkpoint_path=folder, steps=2, seed=seed, **options)) == 0
        found[name] = folder / "model000002.pt"
    return found


@pytest.fixture
def texts(tmp_path: Path, berts: dict[str, Path], teachers: dict[str, Path]) -> dict[str, Path]:
    """Files that flags may name, for the values in capitals below."""
    vocab = tmp_path / "vocab.json"
    tokenizers.save(train_word_level([*LINES, "more words"]), vocab)
    return (
        berts
        | teachers
        | {
            "OTHER": write_text(tmp_path / "other.txt", LINES[:40]),
            "PAIRS": write_text(tmp_path / "pairs.tsv", [f"{line.split()[1]}\t{line}" for line in LINES]),
            "HELD_OUT": write_text(tmp_path / "held-out.txt", LINES[:6]),
            "VOCAB": vocab,
            "FOLDER": tmp_path / "elsewhere",
        }
    )


WORDS = {"objective": "cross_entropy", "diffusion_steps": None}  # None: left out
TAUGHT = {**WORDS, "teacher": "TEACHER", "pairs": 8, "teacher_levels": 3}
PRETRAINED = {"init_pretrained": True, "pretrained_embeddings": True, "in_channel": 16, "num_layers": 2}
NO_EMBEDDINGS = {"pretrained_embeddings": False}
TRAIN_CASES = {
    "objective": Case("autoregressive", "error"),  # of the others set here; what it does is in test_autoregressive
    "denoiser": Case("modern", "weights"),
    "in_channel": Case(4, "weights"),
    "hidden_size": Case(32, "weights"),
    "num_layers": Case(2, "weights"),
    "num_heads": Case(4, "weights"),
    "num_channels": Case(4, "weights"),
    "neighbours": Case(2, "weights"),
    "activation": Case("gelu", "weights"),
    "norm": Case("post", "weights"),
    "dropout": Case(0.2, "weights"),
    "self_condition": Case(False, "weights"),
    "output_prior": Case(False, "weights", WORDS),
    "denoised_input": Case(False, "weights", WORDS),
    "output_scale": Case(1.0, "weights", WORDS),
    "shared_evidence": Case(False, "weights", WORDS),
    "least_evidence": Case(0.5, "weights", WORDS),
    "known_words": Case(False, "weights", WORDS),
    "condition": Case("source", "weights", {"train_txt_path": "PAIRS"}),
    "drop_condition": Case(0.5, "weights", {"train_txt_path": "PAIRS", "condition": "source"}),
    "pretrained_model": Case("OTHER_BERT", "weights", {"pretrained_model": "BERT", **PRETRAINED}),
    "init_pretrained": Case(True, "weights", {"pretrained_model": "BERT", **PRETRAINED, "init_pretrained": False}),
    "pretrained_embeddings": Case(
        True, "weights", {"pretrained_model": "BERT", **PRETRAINED, "pretrained_embeddings": False}
    ),
    "freeze_embeddings": Case(True, "weights", {"pretrained_model": "BERT", **PRETRAINED}),
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
    "optimizer": Case("adamw", "weights"),
    "weight_decay": Case(0.5, "weights", {"lr": 0.1}),
    "gradient_clipping": Case(0.01, "weights"),
    "ema_rate": Case("0.1,0.99", "names"),
    "seed": Case(1, "weights"),
    "teacher": Case("OTHER_TEACHER", "weights", TAUGHT),
    "pairs": Case(20, "weights", TAUGHT),
    "teacher_levels": Case(4, "weights", TAUGHT),
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
    several = ["parallel"]  # which changes nothing for one process: see test_ranks
    assert list(TRAIN_CASES) == [name for name in names(*TRAIN_GROUPS) if name not in several]


def observe_training(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Everything that can be seen of a run from outside, and how often the network was asked and compiled."""
    calls: list[int] = []
    compiled: list[object] = []
    layers: list[int] = []
    deterministic: set[bool] = set()
    waits: list[Saver] = []
    diffusion_lm = objectives.OBJECTIVES["diffusion_lm"]

    def counted(network: Any, diffusion: Any, input_ids: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(input_ids))
        deterministic.add(torch.are_deterministic_algorithms_enabled())
        return diffusion_lm.loss(network, diffusion, input_ids, *rest)

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
        patch.setitem(objectives.OBJECTIVES, "diffusion_lm", replace(diffusion_lm, loss=counted))
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
    "resample": Case(3, "sentences", {"sampler": "ancestral", "steps": 6}),
    "churn": Case(4.0, "sentences", {"sampler": "heun", "steps": 6}),
    "halt": Case(1, "sentences"),
    "temperature": Case(0.5, "error"),  # of weights without probabilities of words; else see test_cross_entropy
    "precision": Case("bf16", "quick"),  # what comes of it: test_quick
    "compile": Case(True, "quick"),
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
    quick: list[tuple[str, bool]] = []
    denoising = TextDiffusion.denoising

    def counted(self: TextDiffusion, start: int, stop: int, **options: Any) -> Iterator[Any]:
        calls.append((start, stop))
        return denoising(self, start, stop, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextDiffusion, "denoising", counted)
        patch.setattr(sample, "quicken", lambda _model, _device, *how: quick.append(how))
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
        "quick": quick,
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
    if case.changes in ("folder", "calls", "stderr", "quick"):
        assert after["sentences"] == before["sentences"]
        assert after["name"] == before["name"]
    if case.changes == "error":
        assert name in after["error"]
