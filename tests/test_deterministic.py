"""--deterministic: on while a run is under way, whether it is new or goes on, and off after it, however it ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import everything, one_sentence, same, stop_at, train_flags

from text_diffusion import step, train
from text_diffusion.deterministic import WORKSPACE, cumulated, deterministic

Seen = tuple[bool, bool, bool, str | None]


def now() -> Seen:
    """What PyTorch and cuBLAS are told."""
    cudnn = torch.backends.cudnn
    told = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    return *told, os.environ.get(WORKSPACE)


OFF, ON = (False, False, False, None), (True, True, False, ":4096:8")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What they are told in each step."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    found: list[Seen] = []
    original = step.train_step

    def train_step(run: Any, state: Any, loss: Any) -> Any:
        found.append(now())
        return original(run, state, loss)

    monkeypatch.setattr(step, "train_step", train_step)  # for stop_at
    monkeypatch.setattr(train, "train_step", train_step)
    return found


def test_a_run_that_goes_on_stays_deterministic(
    seen: list[Seen], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit that of a run without stop, and on a CPU that of a run without the flag."""
    folder = tmp_path / "run"
    given = {"steps": 6, "eval_interval": 2, "schedule_sampler": "loss-second-moment"}
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert train.main(train_flags(corpus, folder, **given, deterministic=True)) == 130
    assert (seen, now()) == ([ON] * 3, OFF)
    assert train.main(train_flags(corpus, folder, **given)) == 0
    assert (seen, now()) == ([ON] * 6, OFF)
    assert train.main(train_flags(corpus, folder, steps=7, deterministic=False)) == 0
    assert seen[6:] == [OFF]
    assert train.main(train_flags(corpus, tmp_path / "plain", **given)) == 0
    assert seen[7:] == [OFF] * 6
    assert same(everything(folder, 6), everything(tmp_path / "plain", 6))


def test_it_is_off_after_an_error(seen: list[Seen], corpus: Path, tmp_path: Path) -> None:
    assert train.main(train_flags(corpus, tmp_path / "run", steps=50, lr=1e30, warmup_steps=0, deterministic=True)) == 1
    assert seen[0] == ON
    assert now() == OFF


def test_what_the_environment_says(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic(True):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    folder = tmp_path / "run"
    assert train.main(train_flags(corpus, folder, deterministic=True)) == 1
    assert "--deterministic expects CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, found :0:0" in one_sentence(
        capsys.readouterr().err
    )
    assert not list(folder.glob("*.pt"))
    assert not (folder / "training_args.json").exists()


def test_an_operation_without_such_a_kernel_is_refused() -> None:
    """It is no empty word: PyTorch raises, in it alone."""
    scattered, index = torch.zeros(4), torch.tensor([1, 1])

    def put() -> None:
        scattered.put_(index, torch.ones(2), accumulate=False)

    put()
    with deterministic(True), pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        put()
    put()


def test_cumulated() -> None:
    p = torch.rand(3, 5)
    with deterministic(True):
        assert torch.equal(cumulated(p), p.cumsum(1))
    assert torch.equal(cumulated(p[0]), p[0].cumsum(0))
