"""Set-ups by the scripts, real ones, from wheels made here, offline."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clones import PINS, TOOLS, call, environment, make_env, run

# --- Which Python


def test_active_environment_is_used_as_it_is(clone: Path, bare: Path, equipped: Path, tmp_path: Path) -> None:
    """With an environment active, `python` counts: `python3` may be the system's."""
    both = tmp_path / "both" / "bin"
    both.mkdir(parents=True)
    for name, env in (("python", equipped), ("python3", bare)):
        (both / name).write_text(f'#!/bin/sh\nexec "{env}/bin/python" "$@"\n')
        (both / name).chmod(0o755)
    variables = environment(both.parent, CONDA_PREFIX=str(both.parent))
    result = run("bash", clone / "scripts" / "setup.sh", env=variables)
    assert result.stdout == f"ready: {equipped}/bin/python\n", result.stderr


def test_old_python_is_refused_in_a_sentence(clone: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools" / "bin"
    tools.mkdir(parents=True)
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (tools / name).symlink_to(found)
    variables = environment(tools.parent) | {"PATH": str(tools)}
    for found in ("none", "Python 3.9.2"):
        result = run("bash", clone / "scripts" / "run_train.sh", env=variables)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: Python 3.11 or newer is needed, found {found};")
        assert not (clone / ".venv").exists()
        (tools / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\n')
        (tools / "python3").chmod(0o755)


def test_python_without_ensurepip_is_refused_in_a_sentence(clone: Path, bare: Path, tmp_path: Path) -> None:
    """As Debian's, before python3-venv is installed."""
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    result = run("bash", clone / "scripts" / "setup.sh", env=environment(bare, PYTHONPATH=str(tmp_path)))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "apt install python3-venv" in result.stderr


# --- .venv


def test_set_up(clone: Path, bare: Path, wheels: Path) -> None:
    """Two start at once where a set-up was interrupted: one is made, both use it; later it follows the requirements."""
    with subprocess.Popen(["true"]) as dead:
        pass
    (clone / ".venv.lock").symlink_to(f"{dead.pid}@{socket.gethostname()}")
    venv = make_env(clone / ".venv", dict.fromkeys(PINS, ""))
    (venv / "made-by-scripts").touch()
    (venv / "left over").touch()
    variables = environment(bare, PIP_FIND_LINKS=str(wheels))
    command = ["bash", str(clone / "scripts" / "setup.sh")]

    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: run(*command, env=variables), range(2)))
    assert [result.returncode for result in both] == [0, 0], both
    assert {result.stdout for result in both} == {f"ready: {venv}/bin/python\n"}
    said = "".join(result.stderr for result in both)
    assert said.count("setting up .venv with the requirements (once; takes a few minutes), as ") == 1
    assert f"{bare}/bin/python3 lacks torch, numpy, tokenizers, tqdm ..." in said
    assert not (venv / "left over").exists()
    assert not (clone / ".venv.lock").is_symlink()

    about = call(clone, bare, "run_train.sh")  # silently: the set-up is over
    assert about["prefix"] == str(venv)
    shim = clone / "src" / "utils" / "custom_tokenizer.py"
    result = run(bare / "bin" / "python", shim, "train-word-level", "a b", env=variables)
    about = json.loads(result.stdout)
    assert (about["argv"], about["prefix"]) == (["train-word-level", "a b"], str(venv))

    (venv / "kept").touch()
    with (clone / "requirements.txt").open("a") as file:
        file.write("one-more==1.0\n")
    result = run(*command, "dev", env=variables)
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        "bringing .venv up to date with the requirements and the development tools (takes up to a few minutes) ...\n"
    )
    assert run(venv / "bin" / "python", "-c", "import one_more, mypy", env=variables).returncode == 0
    assert (venv / "kept").exists()
    assert run(*command, env=variables).stderr == ""


def test_package_whose_module_has_another_name(clone: Path, tmp_path: Path) -> None:
    """As pytest-xdist, which is imported as xdist."""
    env = make_env(tmp_path / "env", {name: "" for name in PINS if name != "tqdm"})
    (info,) = (path / "tqdm-99.dist-info" for path in env.glob("lib/python*/site-packages"))
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tqdm\nVersion: 99\n")
    result = run("bash", clone / "scripts" / "setup.sh", env=environment(env))
    assert result.stdout == f"ready: {env}/bin/python3\n", result.stderr


def test_old_versions_are_not_used(clone: Path, tmp_path: Path) -> None:
    """Below the ranges of setup.py; newer than what is pinned is as good, as is what cannot be told."""
    env = make_env(tmp_path / "env", dict.fromkeys(PINS, ""))
    make_env(clone / ".venv", dict.fromkeys(PINS, ""))  # is there to be used instead
    (info,) = (path / "torch-0.dist-info" for path in env.glob("lib/python*/site-packages"))
    info.mkdir()
    command, variables = ["bash", str(clone / "scripts" / "setup.sh")], environment(env)
    for version in ("2.11.0", "2.11.0+cu130", "2.100.0a0", "3.0"):
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        assert run(*command, env=variables).stdout == f"ready: {env}/bin/python3\n"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1+cpu\n")
    result = run(*command, env=variables)
    assert (result.stdout, result.stderr) == (f"ready: {clone}/.venv/bin/python\n", "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_set_up(clone: Path, bare: Path, number: int, status: int) -> None:
    """Ctrl-C goes to all processes of the terminal; so does this."""
    command = ["bash", str(clone / "scripts" / "run_train.sh")]
    with subprocess.Popen(
        command, env=environment(bare), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("setting up .venv")
        os.killpg(process.pid, number)
        said = process.stderr.read()
    assert said.removeprefix("Terminated\n") == "stopped; the same command sets up again\n"  # bash's own word
    assert process.returncode in (status, -number)
    assert not (clone / ".venv.lock").is_symlink()
    assert not (clone / ".venv" / "core.ready").exists()


def test_failed_set_up_says_why(clone: Path, bare: Path) -> None:
    result = run("bash", clone / "scripts" / "run_train.sh", env=environment(bare))
    log = clone / ".venv" / "setup.log"
    assert (result.returncode, result.stdout) == (1, "")
    assert "No matching distribution found for torch==" in result.stderr
    assert "No matching distribution found for torch==" in log.read_text()
    assert result.stderr.splitlines()[-1].startswith("error: setting up .venv failed")
    assert str(log) in result.stderr.splitlines()[-1]
    assert not list((clone / ".venv").glob("*.ready"))
    assert not (clone / ".venv.lock").is_symlink()


def test_venv_of_the_user_is_used_and_never_removed(clone: Path, bare: Path) -> None:
    venv = make_env(clone / ".venv")
    result = run("bash", clone / "scripts" / "setup.sh", env=environment(bare))
    assert result.returncode == 1
    assert "No module named pip" in result.stderr
    assert (venv / "bin" / "python").exists()

    make_env(venv, dict.fromkeys(PINS, ""))
    assert call(clone, bare, "run_train.sh")["prefix"] == str(venv)

    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")  # as a Python that is too old
    (venv / "bin" / "python").chmod(0o755)
    result = run("bash", clone / "scripts" / "setup.sh", env=environment(bare))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"error: {venv} was not made by these scripts and has no Python 3.11 or newer;")
    assert (venv / "pyvenv.cfg").exists()


def test_tokenizer_names_the_set_up_where_there_is_none(clone: Path, bare: Path) -> None:
    shim = clone / "src" / "utils" / "custom_tokenizer.py"
    venv = make_env(clone / ".venv")
    (venv / "made-by-scripts").touch()  # but not completed
    for python in (bare, venv):
        result = run(python / "bin" / "python", shim, "train-word-level", "x", env=environment(bare))
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(f"error: No module named 'tokenizers' in {python}/bin/python")
        assert f"run `bash '{clone}/scripts/setup.sh'` once" in result.stderr
        (venv / "core.ready").touch()  # as if complete: its own Python must not start itself for ever
