"""Sentences in the making, on a terminal and elsewhere; the command as a process."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from toy import (
    SRC,
    files,
    flags,
    lines_of,
    one_sentence,
    start,
    train_flags,
    write_samples,
    write_text,
)

import text_diffusion
from text_diffusion import __main__ as entry
from text_diffusion import train

STAGE = re.compile(r"t +(\d+)  ?(.*)")


def stages(err: str) -> dict[int, list[str]]:
    """The sentences shown for each t."""
    found: dict[int, list[str]] = {}
    for line in err.splitlines():
        match = STAGE.fullmatch(line)
        if match:
            found.setdefault(int(match[1]), []).append(match[2])
    return found


def test_stages_without_a_terminal(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Noise first, at most nine stages, and at last what is written, all on standard error, without control codes."""
    path, out, err = write_samples(capsys, weights, steps=20, show=3)
    shown = stages(err)
    assert list(shown) == sorted(shown, reverse=True)
    assert (max(shown), min(shown)) == (19, 0)
    assert 5 <= len(shown) <= 9
    assert all(len(sentences) == 3 for sentences in shown.values())
    assert shown[0] == lines_of(path)[:3]
    assert shown[19] != shown[0]
    assert "\x1b" not in err + out
    assert not stages(out)


@pytest.mark.parametrize(("show", "num_samples", "batch_size", "count"), [(0, 5, 0, 0), (9, 5, 0, 5), (4, 5, 2, 2)])
def test_how_many_are_shown(
    show: int, num_samples: int, batch_size: int, count: int, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first batch, no more than there are."""
    _, _, err = write_samples(capsys, weights, show=show, num_samples=num_samples, batch_size=batch_size)
    shown = stages(err)
    assert all(len(sentences) == count for sentences in shown.values())
    assert bool(shown) == bool(count)
    if not count:
        assert err == ""


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 15, 16, 17, 20])
def test_any_number_of_steps_is_shown(steps: int, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, err = write_samples(capsys, weights, steps=steps, show=1, num_samples=1)
    shown = stages(err)
    assert min(steps, 8) <= len(shown) <= 9
    assert list(shown.values())[-1] == lines_of(path)


def on_a_terminal(columns: int, *command: str) -> tuple[int, str, str]:
    """Exit status, standard output and what a terminal of so many columns on standard error was sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = start(*command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, shown.decode()


def screen(text: str) -> list[str]:
    """What stands on a terminal after the text: carriage return, newline, cursor up and clear line are understood."""
    lines, row, column = [""], 0, 0
    for code in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|[^\x1b\r\n]+", text):
        if code == "\r":
            column = 0
        elif code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code.endswith("A") and code.startswith("\x1b"):
            row -= int(code[2:-1] or 1)
            assert row >= 0, "the cursor left the top of the screen"
        elif code == "\x1b[2K":
            lines[row] = ""
        elif code == "\x1b[K":
            lines[row] = lines[row][:column]
        else:
            assert not code.startswith("\x1b"), f"what is {code!r}?"
            lines[row] = lines[row][:column].ljust(column) + code + lines[row][column + len(code) :]
            column += len(code)
    return lines


@pytest.mark.parametrize("columns", [80, 30, 0])
def test_stages_on_a_terminal(columns: int, weights: Path) -> None:
    """Each step in place of the one before, cut to the width, with a bar below that is gone in the end."""
    command = flags(model_name_or_path=weights, num_samples=6, show=3, batch_size=4, steps=20)
    status, out, shown = on_a_terminal(columns, "sample", *command)
    assert status == 0, shown
    path = Path(out.splitlines()[-1].removeprefix("written the decoded output to "))
    assert out.splitlines()[:-1] == lines_of(path)
    assert "\x1b" not in out
    assert shown.count("t    13") == 3, "every step is shown"
    assert "call" in shown, "there was a bar"
    final = [line.rstrip() for line in screen(shown)]
    assert not any(final[3:])
    columns = columns or 80  # of terminals that do not say
    for line, sentence in zip(final[:3], lines_of(path)[:3], strict=True):
        whole = f"t     0  {sentence}"
        assert whole.startswith(line)
        assert len(line) <= columns
        assert line == whole or len(line) > columns - 8


# Processes


def test_module_and_entry_point(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m text_diffusion sample`, from another folder, is the same command."""
    path, _, err = write_samples(capsys, weights, num_samples=6, seed=2)
    expected = path.read_bytes()
    path.unlink()
    command = flags(model_name_or_path=weights, num_samples=6, seed=2)
    process = start("sample", *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
    out, its_err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert path.read_bytes() == expected
    assert out.splitlines()[-1] == f"written the decoded output to {path}"
    assert its_err == err
    assert entry.main(["sample", *command]) == 0
    assert capsys.readouterr().out == out


def test_reader_that_has_gone(weights: Path) -> None:
    """`... | head -1`: no traceback, nothing said, the file is there."""
    read, write = os.pipe()
    os.close(read)
    command = flags(model_name_or_path=weights, num_samples=5, show=0)
    process = start("sample", *command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode not in (0, 1)
    assert len(files(weights.parent)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_takes_no_more(weights: Path) -> None:
    """As a full disk behind `> file`."""
    with open("/dev/full", "w") as full:
        process = start(
            "sample", *flags(model_name_or_path=weights, num_samples=2, show=0), stdout=full, stderr=subprocess.PIPE
        )
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert one_sentence(err) == "error: expected room for what is printed, found the disk full"


def test_reader_of_the_usage_that_has_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("--help", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


def test_terminal_that_cannot_show_a_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown in some other way; the file has it."""
    corpus, folder = write_text(tmp_path / "my.txt", ["naïve"] * 3), tmp_path / "run"
    assert train.main(train_flags(corpus, folder, steps=60, lr=0.02, warmup_steps=0)) == 0
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = flags(model_name_or_path=folder / "model000060.pt", num_samples=2)
    process = start("sample", *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    path = Path(out.splitlines()[-1].removeprefix("written the decoded output to "))
    assert "naïve" in lines_of(path)


def test_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) == 0
    usage = capsys.readouterr().out
    for name in ("train", "sample", "train-word-level", "train-byte-level"):
        assert f"\n  {name} " in usage
        with pytest.raises(SystemExit) as end:
            entry.main([name, "--help"])
        assert end.value.code == 0
        capsys.readouterr()
    assert entry.main(["tain"]) == 1
    assert one_sentence(capsys.readouterr().err).endswith("found 'tain'")


def test_importing_does_nothing() -> None:
    """The package alone does not wait for torch."""
    code = "import sys, text_diffusion; print('torch' in sys.modules, text_diffusion.__version__)"
    command = ["-c", code]
    process = subprocess.run(
        [shutil.which("python3") or "python3", *command], env={"PYTHONPATH": str(SRC)}, capture_output=True, check=True
    )
    assert process.stdout.decode().split() == ["False", text_diffusion.__version__]
