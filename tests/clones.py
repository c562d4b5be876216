"""A copy of the repository whose package is a stub that prints how it was called, as JSON; environments for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINS = dict(
    re.findall(r"^(\w[\w-]*)==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    + re.findall(r"^(\w[\w-]*)==(.+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
)
TOOLS = ("bash", "cat", "cksum", "dirname", "ln", "mkdir", "mv", "readlink", "rm", "sh", "sleep", "tail")  # no Python
STUB = """
import json, os, sys

def main():
    about = {"argv": sys.argv[1:], "cwd": os.getcwd(), "prefix": sys.prefix, "path": os.environ.get("PYTHONPATH")}
    print(json.dumps(about))
    return 0

if __name__ == "__main__":
    import random  # as torch does
    main()
"""
TOOL_STUB = """
import os, sys
print("ran", __spec__.name, *sys.argv[1:], "in", os.getcwd())
sys.exit(3 * (__spec__.name == os.environ.get("FAILING")))
"""


def make_env(path: Path, modules: dict[str, str] | None = None) -> Path:
    """A virtual environment without pip, which holds modules of the given names and sources."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    for name, source in (modules or {}).items():
        (next(path.glob("lib/python*/site-packages")) / f"{name}.py").write_text(source)
    return path


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with one empty module."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of all that is pinned, and of one more package."""
    folder = tmp_path_factory.mktemp("wheels")
    for name, version in [*PINS.items(), ("one-more", "1.0")]:
        make_wheel(folder, name, version)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without the requirements."""
    return make_env(tmp_path_factory.mktemp("envs") / "bare")


@pytest.fixture(scope="module")
def equipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which all requirements are found; the checkers print that they ran."""
    modules = {name.replace("-", "_"): TOOL_STUB if name in ("ruff", "mypy", "pytest") else "" for name in PINS}
    return make_env(tmp_path_factory.mktemp("envs") / "equipped", modules)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the scripts consist of, at a path with spaces."""
    clone = tmp_path / "a clone"
    for folder in ("scripts", ".ci", "src/utils"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-mpi.txt", "setup.py"):
        shutil.copy(ROOT / name, clone)
    azurite = clone / "node_modules" / ".bin" / "azurite-blob"  # so that CI's script installs nothing
    azurite.parent.mkdir(parents=True)
    azurite.touch(0o755)
    package = clone / "src" / "text_diffusion"
    package.mkdir()
    sources = {"__init__": "", "__main__": STUB, "tokenizer": f"import tokenizers\n{STUB}"}
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    return clone


def environment(python: Path, **more: str) -> dict[str, str]:
    """Variables under which `python3` is that of the environment `python`, and pip finds nothing by default."""
    dropped = ("PYTHON", "PIP_", "VIRTUAL_ENV", "CONDA_PREFIX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    pip = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    return kept | pip | {"PATH": f"{python / 'bin'}{os.pathsep}{os.environ['PATH']}"} | more


def run(*command: str | Path, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True, timeout=120)


def call(clone: Path, python: Path, script: str, *arguments: str) -> dict[str, Any]:
    """What the stub got from a script that must succeed without a word of its own."""
    result = run("bash", clone / "scripts" / script, *arguments, env=environment(python))
    assert (result.returncode, result.stderr) == (0, "")
    about: dict[str, Any] = json.loads(result.stdout)
    return about


def refusal(clone: Path, python: Path, script: str, *arguments: str) -> str:
    """The one line in which a script refuses its arguments, before any work."""
    result = run("bash", clone / "scripts" / script, *arguments, env=environment(python))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (clone / ".venv").exists()
    return result.stderr
