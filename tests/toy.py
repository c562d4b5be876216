"""What the tests of the commands share: a toy corpus, toy sizes, and looking into the files of a run."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from text_diffusion import sample, train
from text_diffusion import step as step_module
from text_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from text_diffusion.device import cpu_has_bf16
from text_diffusion.flags import Options
from text_diffusion.run import Run
from text_diffusion.state import TrainState

SRC = Path(__file__).resolve().parent.parent / "src"
LINES = [
    f"The {colour} {food} is {state}."
    for colour, food, state in product(
        ("red", "blue", "old", "new", "raw"), ("apple", "fig", "pear", "egg"), ("ripe", "cold", "sweet", "hot")
    )
]
SIZES: dict[str, Any] = {
    "batch_size": 8,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "in_channel": 8,
    "num_channels": 8,
    "diffusion_steps": 20,  # so it is the objective of Diffusion-LM
    "ema_rate": 0.9,
    "eval_interval": 0,
}
TRAIN_GROUPS: tuple[type[Options], ...] = (ModelConfig, DiffusionConfig, DataConfig, TrainConfig)
TIMINGS = ("seconds", "sentences_per_s")  # what differs between two equal runs
Trained = Callable[..., Path]  # the fixture `go`: trains on the toy corpus, returns the folder
COPIED = {"steps": 6, "save_interval": 3, "log_interval": 2, "eval_interval": 3}  # how `trained` and `copied` were made
RAW, EMA, OPT = "model000006.pt", "ema_0.9_000006.pt", "opt000006.pt"  # what those wrote last


def flags(**options: Any) -> list[str]:
    """--name value for each option."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def names(*groups: type[Options]) -> list[str]:
    """The flags of the groups."""
    return [f.name for group in groups for f in fields(group)]  # type: ignore[arg-type]


def train_flags(corpus: Path, folder: Path, **options: Any) -> list[str]:
    """Flags of a toy run on the corpus; options add to the toy sizes or beat them."""
    return flags(dataset=corpus, checkpoint_path=folder, **SIZES | options)


def write_text(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def contents(path: Path) -> dict[str, Any]:
    """What is in a .pt file, read without our code."""
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def same(a: Any, b: Any) -> bool:
    """Whether nested plain values and tensors are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def weights_of(folder: Path, pattern: str = "*.pt") -> dict[str, Any]:
    """Of each weights file, by name, its weights."""
    return {path.name: contents(path)["state"] for path in folder.glob(pattern) if not path.name.startswith("opt")}


def everything(folder: Path, step: int) -> dict[str, Any]:
    """All that training changes, of the checkpoint at a step: weights, averages, optimizer, what was measured."""
    opt = contents(folder / f"opt{step:06d}.pt")
    state = {name: opt[name] for name in ("step", "optimizer", "emas", "timestep_sampler", "loss_by_timestep")}
    shards = {path.name: load_file(path) for path in sorted((folder / f"opt{step:06d}.shards").glob("*.safetensors"))}
    return state | {"weights": weights_of(folder, f"*{step:06d}*.pt"), "shards": shards}


def metrics(folder: Path, validation: bool = False) -> list[dict[str, float]]:
    """The rows of training, or those of validation, without timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    kept = [row for row in rows if ("val_loss" in row) is validation]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in kept]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_at(step: int, patch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Have the signal (of Ctrl-C, if no other is named) come in the middle of the step that ends at `step`."""
    original = step_module.train_step

    def train_step(run: Run, state: TrainState, network: Any) -> Any:
        result = original(run, state, network)
        if state.step == step:
            signal.raise_signal(number)
        return result

    patch.setattr(train, "train_step", train_step)


HAS_BF16 = cpu_has_bf16()


def one_sentence(err: str) -> str:
    """The error that a command ended with; asserts that it is one line, and nothing like a traceback before it."""
    lines = err.splitlines()
    assert lines, "the command said nothing"
    assert lines[-1].startswith("error: "), err
    assert sum(line.startswith("error: ") for line in lines) == 1, err
    assert "Traceback" not in err
    return lines[-1]


def environment() -> dict[str, str]:
    """For a command as a process of its own: the package, and one thread as in the tests, so that sums are the same."""
    return os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}


def start(*command: str, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m text_diffusion ...`; the caller waits for it."""
    arguments = [sys.executable, "-m", "text_diffusion", *command]
    return subprocess.Popen(arguments, env=environment(), text=True, encoding="utf-8", **options)


class FakeWandb(types.ModuleType):
    """Takes the calls that wandb would."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.given: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **given: Any) -> FakeWandb:
        self.given = given
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system refuses to write more than that to any file, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_samples(capsys: pytest.CaptureFixture[str], weights: Path, **options: Any) -> tuple[Path, str, str]:
    """The file that was written, and what was said on standard output and standard error."""
    assert sample.main(flags(model_name_or_path=weights, **options)) == 0
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    assert last.startswith("written the decoded output to ")
    return Path(last.removeprefix("written the decoded output to ")), out, err


def lines_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text.split("\n")[:-1]


def sampled(capsys: pytest.CaptureFixture[str], path: Path, **options: Any) -> list[str]:
    """The sentences that the command writes to the file that it names."""
    return lines_of(write_samples(capsys, path, show=0, **options)[0])


def refused(capsys: pytest.CaptureFixture[str], path: Path, **options: Any) -> str:
    """The sentence with which the command refuses a file."""
    assert sample.main(flags(model_name_or_path=path, show=0, **options)) == 1
    return one_sentence(capsys.readouterr().err)
