"""`scripts/ctrl_text_sample.sh`, run for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script from another directory, with the Python of the tests first in the PATH."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "scripts" / "ctrl_text_sample.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_controls_of_all_kinds(writer: Path, classifier: Path, tmp_path: Path) -> None:
    """A classifier's label, words and a length at once; the file, by a path that is relative, has what is printed."""
    controls = ("--label", "red", "--classifier", classifier, "--want", "fig", "--avoid", "hot,cold", "--length", 5)
    done = run(tmp_path, writer, 10, 4, "--out_dir", "out", *controls)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == f"written the decoded output to out/{writer.stem}.samples_4.steps-10.clamp-no_clamp.seed-10708.txt"
    assert (tmp_path / last.rpartition(" ")[2]).read_text().splitlines() == lines
    assert len(lines) == 4
    for line in lines:
        assert len(line.split()) == 5
        assert "fig" in line
        assert not {"hot", "cold"} & set(line.rstrip(".").split())
    assert sum(" red " in line for line in lines) >= 3


def test_refusals(writer: Path, tmp_path: Path) -> None:
    """A sentence and a status; nothing is left behind."""
    for arguments, message in (
        ([""], "error: CKPT, the weights file to sample from, is missing; usage: bash scripts/ctrl_text_sample.sh"),
        ([writer, 10, 4, 5], "error: at most 3 arguments go before the first --flag, found '5' after them; usage:"),
        (
            [writer, 10, 4, "--out_dir", "out", "--length", 3, "--template", "The [GAP] fig is [GAP] hot."],
            "error: --length 3 contradicts --template 'The [GAP] fig is [GAP] hot.', which has at least 6 words",
        ),
    ):
        done = run(tmp_path, *arguments)
        assert done.returncode in (1, 2)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        assert done.stderr.startswith(message)
        assert list(tmp_path.iterdir()) == []
