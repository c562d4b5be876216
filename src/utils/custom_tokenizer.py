"""Train a tokenizer: `python src/utils/custom_tokenizer.py train-word-level|train-byte-level FILE`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main() -> int:
    """Run the package's command here or, where this Python lacks the requirements, in the repository's .venv."""
    sys.path.insert(0, str(ROOT / "src"))
    try:
        if sys.version_info < (3, 11):  # noqa: UP036  (this file alone may meet an old Python)
            raise ModuleNotFoundError("No Python 3.11 or newer")
        from text_diffusion import tokenizer
    except ModuleNotFoundError as error:
        return go_on_in_venv(error)
    return tokenizer.main()


def go_on_in_venv(error: ModuleNotFoundError) -> int:
    """Start again with the Python of .venv, if scripts/env.sh (or somebody else) has completed that."""
    complete = (VENV / "core.ready").exists() or not (VENV / "made-by-scripts").exists()
    if PYTHON.exists() and complete and Path(sys.prefix).resolve() != VENV.resolve():
        command = [str(PYTHON), *sys.argv]
        if os.name == "nt":  # os.execv there returns to the shell before the new process has ended
            return subprocess.call(command)
        os.execv(command[0], command)
    print(
        f"error: {error} in {sys.executable}; run `bash '{ROOT / 'scripts/setup.sh'}'` once, then this again",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
