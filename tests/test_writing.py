"""Files are whole or absent, whatever comes between: a failure, a reader, a full disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO

import pytest
import torch
from toy import (
    OPT,
    RAW,
    SIZES,
    files,
    flags,
    no_file_above,
    one_sentence,
    same,
    train_flags,
    weights_of,
)

from text_diffusion import train
from text_diffusion.errors import UserError
from text_diffusion.files import check_writable, write_atomically


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model000001.pt"
    path.write_bytes(b"old")

    def fails(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        raise error

    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("torch's way\nto say so"),
        ValueError("a bug"),
        KeyboardInterrupt(),
    ):
        expected = UserError if isinstance(error, (OSError, RuntimeError)) else type(error)
        with pytest.raises(expected) as caught:
            write_atomically(path, fails)
        if expected is UserError:
            assert str(caught.value).startswith(f"{path}: cannot be written: ")
            assert "\n" not in str(caught.value)
        assert files(tmp_path) == {path.name: b"old"}


def test_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"two"):
        write_atomically(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
        assert files(tmp_path) == {"a/b/file": content}


def test_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"n")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"ew")

    write_atomically(path, write)
    assert path.read_bytes() == b"new"


def test_write_is_on_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spied_fsync(number: int) -> None:
        order.append("fsync")
        fsync(number)

    def spied_replace(path: Path, to: Path) -> Path:
        order.append("replace")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(Path, "replace", spied_replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert order[:2] == ["fsync", "replace"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{folder}: expected a folder to write to, found "):
            check_writable(folder)
        with pytest.raises(UserError, match="cannot be written"):
            write_atomically(folder / "x", lambda file: file.write(b"x"))
    check_writable(tmp_path / "new" / "folder")
    assert set(files(tmp_path)) == {"file"}


@pytest.mark.parametrize("share", [0.5, 2.0], ids=["no weights fit", "only weights fit"])
def test_full_disk(
    share: float, corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saving fails with a sentence; the checkpoint before is whole, and training goes on from it once there is room."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(trained, folder)
    shutil.copytree(trained, whole)
    before = {name: content for name, content in files(folder).items() if name.endswith(".pt")}
    limit = int(share * (trained / RAW).stat().st_size)
    assert limit < (trained / OPT).stat().st_size
    options = train_flags(corpus, folder, steps=9, save_interval=3, log_interval=2)
    with no_file_above(limit):
        assert train.main(options) == 1
    assert "000009.pt: cannot be written: File too large" in one_sentence(capsys.readouterr().err)
    after = files(folder)
    assert before.items() <= after.items()
    assert not [name for name in after if name.endswith(".tmp") or name.startswith("opt000009")]

    assert train.main(options) == 0
    assert "going on from step 6" in capsys.readouterr().err
    assert train.main(train_flags(corpus, whole, steps=9, save_interval=3, log_interval=2)) == 0
    assert same(weights_of(folder), weights_of(whole))


@pytest.mark.parametrize("room", range(0, 12_000, 500))
def test_full_disk_is_named_wherever_it_ends(room: int, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1000), "b": torch.ones(2000)}
    with no_file_above(room), pytest.raises(UserError, match=r"x\.pt: cannot be written: File too large"):
        write_atomically(tmp_path / "x.pt", lambda file: torch.save(tensors, file))
    assert files(tmp_path) == {}


def test_full_disk_takes_no_weights_that_were_there(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint whose opt file has gone, made a second time."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / OPT).unlink()
    before = {name for name in files(folder) if name.endswith(".pt")}
    with no_file_above(2 * (trained / RAW).stat().st_size):
        assert train.main(train_flags(corpus, folder, steps=6, save_interval=3, log_interval=2)) == 1
    assert f"{OPT}: cannot be written" in one_sentence(capsys.readouterr().err)
    assert {name for name in files(folder) if name.endswith(".pt")} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_under_the_metrics(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert train.main(train_flags(corpus, tmp_path, steps=2, log_interval=1)) == 1
    assert "No space left on device" in one_sentence(capsys.readouterr().err)


def test_disk_that_is_full_at_the_start(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with no_file_above(0):
        assert train.main(train_flags(corpus, tmp_path / "run")) == 1
    assert f"{tmp_path / 'run'}/.lock: cannot be written: File too large" in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("flag", ["dataset", "checkpoint_path"])
def test_name_that_is_too_long(flag: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    given = {"dataset": corpus, "checkpoint_path": "/tmp/never"} | {flag: f"/tmp/{long}"}
    assert train.main(flags(**SIZES, **given, steps=1)) == 1
    assert f"/tmp/{long}" in (said := one_sentence(capsys.readouterr().err))
    assert said.endswith("File name too long")
