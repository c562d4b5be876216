"""The scripts, run by a real bash in a copy of the repository; set-ups are real too, from wheels made here, offline.

The copy's package is a stub that prints how it was called, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
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


# --- Arguments


def train_arguments(dataset: str = "simple", gpu: str = "all", *switches: str) -> list[str]:
    names = ("--init_pretrained", "--pretrained_embeddings", "--freeze_embeddings")
    values = (*switches, "False", "False", "False")
    return [
        "train",
        "--dataset",
        dataset,
        "--gpu",
        gpu,
        *(part for pair in zip(names, values, strict=False) for part in pair),
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], train_arguments()),
        (["greetings"], train_arguments("greetings")),
        (["", "0,1"], train_arguments("simple", "0,1")),
        (["x", "", "TRUE", "", "true"], train_arguments("x", "all", "True", "False", "True")),
        (["", "", "", "", "", "300"], [*train_arguments(), "--steps", "300"]),
        (["a b.txt", "--lr", "1", ""], [*train_arguments("a b.txt"), "--lr", "1", ""]),
        (["--note", "two words", "--x=*"], [*train_arguments(), "--note", "two words", "--x=*"]),
    ],
)
def test_run_train_passes_its_arguments_on(clone: Path, equipped: Path, given: list[str], expected: list[str]) -> None:
    about = call(clone, equipped, "run_train.sh", *given)
    assert (about["argv"], about["prefix"]) == (expected, str(equipped))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["c.pt"], ""),
        (["c.pt", "200", "", "out"], "--steps 200 --out_dir out"),
        (["c.pt", "--steps", "3", "4"], "--steps 3 4"),
        (
            ["c.pt", "1", "2", "3", "4", "0.5", "clamp", "7", "8", "--show", "0"],
            "--steps 1 --num_samples 2 --out_dir 3 --batch_size 4 --top_p 0.5 --clamp clamp --sequence_len 7 --seed 8 "
            "--show 0",
        ),
    ],
)
def test_text_sample_passes_what_is_given(clone: Path, equipped: Path, given: list[str], expected: str) -> None:
    about = call(clone, equipped, "text_sample.sh", *given)
    assert about["argv"] == ["sample", "--model_name_or_path", "c.pt", *expected.split()]
    about = call(clone, equipped, "text_sample.sh", "a b.pt", "--note", "two words")
    assert about["argv"] == ["sample", "--model_name_or_path", "a b.pt", "--note", "two words"]


def test_evaluate_and_report_pass_their_arguments_on(clone: Path, equipped: Path, bare: Path) -> None:
    about = call(clone, equipped, "evaluate.sh", "a b.txt", "--reference", "c d.txt", "--json=x")
    assert about["argv"] == ["evaluate", "a b.txt", "--reference", "c d.txt", "--json=x"]
    about = call(clone, equipped, "report.sh", "a b", "c", "--play")
    assert about["argv"] == ["report", "a b", "c", "--play"]
    for arguments in ([], [""], ["--reference", "x"]):
        assert "SAMPLES, the text to judge, is missing; usage: " in refusal(clone, bare, "evaluate.sh", *arguments)
        assert "RUN, a run's folder or a weights file, is missing; usage: " in refusal(
            clone, bare, "report.sh", *arguments
        )


def test_nproc_starts_as_many(clone: Path, equipped: Path) -> None:
    """Under the mpiexec beside Python; one process is started without."""
    mpiexec = equipped / "bin" / "mpiexec"
    mpiexec.write_text('#!/bin/sh\necho "mpiexec $1 $2" >&2\nshift 2\nexec "$@"\n')
    mpiexec.chmod(0o755)
    for number, said in (("3", "mpiexec -n 3\n"), ("1", ""), ("", "")):
        result = run("bash", clone / "scripts" / "run_train.sh", env=environment(equipped, NPROC=number))
        assert (result.returncode, result.stderr) == (0, said)
        assert json.loads(result.stdout)["argv"] == train_arguments()
    for number in ("0", "x", "-1", "2.5"):
        result = run("bash", clone / "scripts" / "run_train.sh", env=environment(equipped, NPROC=number))
        assert result.returncode == 2
        assert f"NPROC must be a number of processes, found '{number}'" in result.stderr


def test_wrong_arguments_are_refused_in_a_sentence(clone: Path, bare: Path) -> None:
    for rest in ([], ["eight"], ["--lr", "1"]):
        message = refusal(clone, bare, "run_train.sh", *6 * [""], "seven", *rest)
        assert "at most 6 arguments go before the first --flag, found 'seven' after them" in message
    assert "FREEZE_EMBEDDINGS must be True or False, found '1'" in refusal(clone, bare, "run_train.sh", *4 * [""], "1")
    for arguments in ([], [""], ["", "20"], ["--steps", "3"]):
        assert "CKPT" in refusal(clone, bare, "text_sample.sh", *arguments)
    assert "'core'" in refusal(clone, bare, "setup.sh", "core")


@pytest.mark.parametrize(
    ("script", "command"),
    [("run_train.sh", "train"), ("text_sample.sh", "sample"), ("evaluate.sh", "evaluate"), ("report.sh", "report")],
)
@pytest.mark.parametrize("arguments", [["-h"], ["x", "--help"]])
def test_help(clone: Path, equipped: Path, script: str, command: str, arguments: list[str]) -> None:
    result = run("bash", clone / "scripts" / script, *arguments, env=environment(equipped))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: bash scripts/{script} ")
    about = json.loads(result.stdout.splitlines()[-1])
    assert about["argv"] == [command, "--help"]


def test_working_directory_stays_and_does_no_harm(clone: Path, equipped: Path, tmp_path: Path) -> None:
    """Called through a link, from elsewhere, where a file has the name of one of Python's own modules."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "random.py").write_text("raise SystemExit('the wrong random')")
    (elsewhere / "train").symlink_to(clone / "scripts" / "run_train.sh")
    result = run("bash", "train", env=environment(equipped, PYTHONPATH="/before"), cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    about = json.loads(result.stdout)
    assert about["cwd"] == str(elsewhere)
    assert about["path"] == f"{clone / 'src'}:/before"


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


# --- The rest


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


def test_run_tests_stops_at_the_first_failure(clone: Path, equipped: Path, tmp_path: Path) -> None:
    script = clone / "scripts" / "run_tests.sh"
    result = run("bash", script, "-k", "a b", env=environment(equipped), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    commands = ["ruff check", "ruff format --check", "mypy", "pytest -n 2 --dist loadfile -k a b"]
    ran = [line for line in result.stdout.splitlines() if line.startswith("ran ")]
    assert ran == [f"ran {command} in {clone}" for command in commands]
    assert re.search(r"^== all checks passed in \d+ seconds$", result.stdout, re.MULTILINE)

    # As if what .ci/run installs were there: tests reach no network.
    for path in (clone / "node_modules" / ".bin" / "azurite-blob", equipped / "bin" / "chromedriver"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    result = run("bash", clone / ".ci" / "run", env=environment(equipped, FAILING="mypy"), cwd=tmp_path)
    assert result.returncode == 3
    assert "ran mypy" in result.stdout
    assert "ran pytest" not in result.stdout
    assert re.fullmatch(r"error: mypy failed, after \d+ seconds in all\n", result.stderr)


def test_runs_leave_git_status_clean(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    names = [
        "ckpts/simple/ema_0.9999_025000.samples_10.steps-20.clamp-no_clamp.seed-10708.txt",
        "ckpts/simple/ema_0.9999_004000.pt",
        "ckpts/simple-cross-entropy/metrics.jsonl",
        "ckpts/mine/tensorboard/events",
        "data/simple/word-level-vocab.json",
        ".venv/core.ready",
        ".venv.lock",
        "src/text_diffusion/__pycache__/x.pyc",
    ]
    tracked = [
        ".gitignore",
        "ckpts/simple-cross-entropy/ema_0.9999_010000.pt",
        "ckpts/simple/ema_0.9999_025000.pt",
        "data/mine-train.txt",
    ]
    for name in names + tracked[1:]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    git = ["git", "-c", "core.excludesFile=", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    shown = subprocess.run([*git, "status", "--porcelain", "-uall"], check=True, capture_output=True, text=True).stdout
    assert sorted(line[3:] for line in shown.splitlines()) == tracked
