"""The walk-through of docs/your_own_data.md, as it is written there, at toy size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from text_diffusion import __main__ as program
from text_diffusion import tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOY = "--hidden_size 16 --num_layers 1 --num_heads 2 --num_channels 8 --eval_interval 0"
FOLDER = "/tmp/own"  # of the walk-through
SCRIPTS = {"run_train.sh": "train", "text_sample.sh": "sample", "ctrl_text_sample.sh": "sample"}
PRINT_ARGUMENTS = 'start() { printf \'%s\\n\' "$COMMAND" "$@"; }\n'


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of code, in order."""
    text = (ROOT / "docs" / "your_own_data.md").read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def at_toy_size(text: str, folder: Path) -> str:
    """Another folder, fewer steps, a smaller network where the sizes are not a pretrained model's."""
    text = re.sub(r"\b(False|True) (600|300) ", r"\1 4 ", text)
    text = re.sub(r"ema_0\.9999_000(600|300)\b", "ema_0.9999_000004", text)
    if "run_train.sh" in text:
        text += " --eval_interval 0" if "--pretrained_model" in text else f" {TOY}"
    return text.replace(FOLDER, str(folder))


def arguments(command: list[str], scripts: Path) -> list[str]:
    """What a script gives to the program, as the script itself works it out."""
    output = subprocess.run(
        ["bash", str(scripts / Path(command[1]).name), *command[2:]], check=True, capture_output=True, text=True
    )
    return output.stdout.split("\n")[:-1]


def run(line: str, scripts: Path) -> None:
    """A command: the program's in this process, as torch takes seconds to import, and others as they are."""
    command = shlex.split(line)
    if command[0] == "bash":
        assert program.main(arguments(command, scripts)) == 0, line
    elif command[0] == "python":
        assert command[1] == "src/utils/custom_tokenizer.py"
        assert tokenizer.main(command[2:]) == 0, line
    else:
        subprocess.run(["bash", "-c", line], cwd=ROOT, check=True)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_walk_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command ends well; what it says that depends on no training is what the document shows."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for path in (ROOT / "scripts").glob("*.sh"):
        text = path.read_text(encoding="utf-8")
        (scripts / path.name).write_text(text + (PRINT_ARGUMENTS if path.name == "env.sh" else ""), encoding="utf-8")
    folder = tmp_path / "own"
    said, checked = "", 0
    for language, block in blocks():
        if language == "python":
            subprocess.run([sys.executable, "-c", block.replace(FOLDER, str(folder))], check=True, cwd=tmp_path)
        elif language == "bash":
            for line in block.splitlines():
                run(at_toy_size(line, folder), scripts)
            out, err = capsys.readouterr()
            said = (out + err).replace(str(folder), FOLDER)
        else:
            for line in block.splitlines():
                if re.search(r"\d lines|in the vocabulary|warning: |trained a |tokenizer makes|tokens from", line):
                    assert line in said.splitlines(), line
                    checked += 1
    assert checked > 15
    assert len(list(folder.glob("*/ema_0.9999_*.pt"))) == 7
    assert os.listdir(folder / "bert")
