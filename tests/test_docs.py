"""What the documents quote is what the program says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Messages of other programs, and symptoms.
FOREIGN = (
    "No module named", "mpi.h", "not enough slots", "NCCL", "has no attribute", "tT_loss", "[PAD]", "[UNK]",
    "BAD TERMINATION", "Abort(", "DistNetworkError",
)  # fmt: skip


def quoted() -> list[str]:
    """The messages in the first column of docs/troubleshooting.md."""
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    return [m for m in messages if " " in m and not m.startswith(FOREIGN) and not m.startswith("--")]


def said() -> str:
    """Every string of the program and its scripts, the parts of f-strings joined by a blank for each value."""
    texts = [(ROOT / "scripts" / "env.sh").read_text()]
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
                texts.append("".join(parts))
    return "\n".join(texts)


def test_reading_order_names_every_module() -> None:
    package = ROOT / "src" / "text_diffusion"
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    named = set(re.findall(r"``(\w+)``", text.partition("Reading order")[2]))
    assert named == {name for name in modules if not name.startswith("_")}


@pytest.mark.parametrize("message", quoted())
def test_quoted_messages_are_said(message: str) -> None:
    """Word by word; `...`, capital single letters and numbers stand for values."""
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|\b[A-Z]\b|\b\d+\b|[A-Z_]+=\d+", message)]
    text = said()
    for piece in pieces:
        assert piece in text, f"{piece!r} is said nowhere"


def test_something_is_quoted() -> None:
    assert len(quoted()) > 12
