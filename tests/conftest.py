"""Fixtures of the tests of the commands: a toy corpus, a run trained on it, a clone of one's own."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import Micro, train_micro
from toy import COPIED, LINES, Trained, train_flags, write_text
from zygote import Zygote

from text_diffusion import files, train
from text_diffusion.control import train_classifier
from text_diffusion.launcher import WORLD_SIZE_VARIABLES

pytest_plugins = ["clones"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take a minute")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if a shell started the tests in the background
    config.addinivalue_line("markers", "slow: takes a minute; runs with --slow only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Toy sizes are slower on many threads, and sums come out the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_launcher() -> Iterator[None]:
    """The tests are one process, even when a launcher started them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", *WORLD_SIZE_VARIABLES):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 lines of 7 tokens."""
    return write_text(tmp_path_factory.mktemp("corpus") / "toy.txt", LINES)


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run: 6 steps, a checkpoint each 3. Only to be looked at: `copied` is for changing it."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert train.main(train_flags(corpus, folder, **COPIED)) == 0
    return folder


@pytest.fixture
def weights(writer: Path, tmp_path: Path) -> Path:
    """A weights file alone in a folder."""
    path = tmp_path / "ckpt" / writer.name
    path.parent.mkdir()
    shutil.copyfile(writer, path)
    return path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the complete run of 6 steps, at tmp_path / "run"."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def go(corpus: Path, tmp_path: Path) -> Trained:
    """Train on the toy corpus into a folder below tmp_path, and return that folder."""

    def go(name: str = "run", status: int = 0, **options: Any) -> Path:
        folder = tmp_path / name
        assert train.main(train_flags(corpus, folder, **options)) == status
        return folder

    return go


@pytest.fixture(scope="session")
def writer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file whose sentences differ from one another."""
    folder = tmp_path_factory.mktemp("runs") / "writer"
    options = {"steps": 200, "lr": 1e-2, "warmup_steps": 0, "hidden_size": 32, "batch_size": 32}
    assert train.main(train_flags(corpus, folder, **options)) == 0
    return folder / "ema_0.9_000200.pt"


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Where processes with the program already imported come from."""
    zygote = Zygote(tmp_path_factory.mktemp("logs"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def micro() -> Micro:
    """A model of a language that can be enumerated."""
    return train_micro()


@pytest.fixture
def toy_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with two datasets, in place of the one that the tests run in."""
    root = tmp_path / "clone"
    for folder in ("scripts", "data", "ckpts"):
        (root / folder).mkdir(parents=True)
    (root / "scripts" / "run_train.sh").touch()
    for name in ("toy", "other"):
        write_text(root / "data" / f"{name}-train.txt", LINES[:70])
        write_text(root / "data" / f"{name}-test.txt", LINES[70:])
    monkeypatch.setattr(files, "SOURCE_ROOT", root)
    return root


@pytest.fixture(scope="session")
def classifier(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the colours of `writer`'s sentences."""
    folder = tmp_path_factory.mktemp("classifier")
    labeled = write_text(folder / "labeled.tsv", [f"{line}\t{line.split()[1]}" for line in LINES])
    argv = [str(writer), "--labeled", str(labeled), "--out", str(folder / "colours.pt"), "--steps", "250"]
    assert train_classifier.main([*argv, "--hidden_size", "32", "--num_layers", "1", "--lr", "5e-3"]) == 0
    return folder / "colours.pt"


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-shaped model that runs may start from."""
    from berts import save_bert  # here, as `transformers` takes seconds to import

    return save_bert(tmp_path_factory.mktemp("bert") / "tiny")


@pytest.fixture
def own(bert: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(bert, tmp_path / "own"))
