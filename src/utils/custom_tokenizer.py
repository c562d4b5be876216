"""Train a tokenizer: `python src/utils/custom_tokenizer.py train-word-level|train-byte-level FILE`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"


def main() -> int:
    """Run the package's command here or, where this Python lacks the requirements, in the repository's .venv."""
    sys.path.insert(0, str(ROOT / "src"))
    try:
        from text_diffusion import tokenizer
    except (ModuleNotFoundError, SyntaxError) as error:  # SyntaxError: a Python older than the package
        return go_on_in_venv(error)
    return tokenizer.main()
