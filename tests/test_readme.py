"""The commands of the README, one after another as they are written there, at toy size and from another directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy import LINES, write_text

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("scripts", "src", "data", "setup.py", "requirements.txt", "requirements-dev.txt", "requirements-mpi.txt")
FOLDERS = {"simple": 25_000, "simple-cross-entropy": 10_000, "simple-student": 8000}
WEIGHTS = [Path("ckpts", folder, f"ema_0.9999_{steps:06d}.pt") for folder, steps in FOLDERS.items()]
TOY = "--hidden_size 16 --num_layers 1 --num_heads 2 --in_channel 8 --num_channels 8 --eval_interval 0"
SMALLER = (  # what is asked of a machine, not what is done
    (r"\b20000$", "5"),
    (r"\bema_0\.9999_020000\b", "ema_0.9999_000005"),
    (r"\b(2000|100) 10$", "20 10"),
)
STEPS = 2  # more for each training command: the later ones go on with the run of the first
WRITTEN = "written the decoded output to "


def commands() -> list[str]:
    """The lines of the bash blocks without their comments, but for that which runs these tests."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines()]
    return [line for line in lines if "run_tests.sh" not in line]


def test_commands_of_the_readme(tmp_path: Path) -> None:
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    (elsewhere / "path" / "to").mkdir(parents=True)
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
        copy(ROOT / part, clone / part)
    for weights in WEIGHTS:
        (clone / weights).parent.mkdir(parents=True)
        shutil.copyfile(ROOT / weights, clone / weights)
    write_text(elsewhere / "path" / "to" / "my-text.txt", LINES)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    trainings, samples = 0, "none yet"
    for command in commands():
        toy = command
        for pattern, small in SMALLER:
            toy = re.sub(pattern, small, toy)
        if "run_train.sh" in toy:
            trainings += 1
            toy += f" {TOY}" + ("" if "my-text" in toy else f" --steps {STEPS * trainings}")
        if "report.sh" in toy:
            toy += " --samples 60 --steps 2 --frames 3"
        toy = re.sub(r"(?<!\S)(scripts|src|data|ckpts)/", rf"{clone}/\1/", toy).replace("SAMPLES", samples)
        done = subprocess.run(
            toy, shell=True, cwd=elsewhere, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{toy}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        samples = done.stdout.rpartition(WRITTEN)[2].strip() if WRITTEN in done.stdout else samples
    assert sorted(path.name for path in (clone / "ckpts").iterdir()) == ["my-text", *FOLDERS]
    assert (clone / f"ckpts/simple/ema_0.9999_{STEPS * trainings:06d}.pt").is_file()
    assert all((clone / weights).read_bytes() == (ROOT / weights).read_bytes() for weights in WEIGHTS)
    assert (clone / "ckpts/simple/report.html").is_file()
    assert [path.name for path in elsewhere.iterdir()] == ["path"]


def test_python_of_the_readme(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library as it is shown, in a process of its own."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    code = code.replace("ckpts/", f"{ROOT}/ckpts/")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert capfd.readouterr().out.count("The ") == 4
