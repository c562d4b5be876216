"""The scripts, run by a real bash in a copy of the repository: what they pass on, refuse and leave behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from clones import ROOT, call, environment, refusal, run

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


# --- The rest


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
        "ckpts/simple-student/model008000.pt",
        "ckpts/mine/tensorboard/events",
        "data/simple/word-level-vocab.json",
        ".venv/core.ready",
        ".venv.lock",
        "src/text_diffusion/__pycache__/x.pyc",
    ]
    tracked = [
        ".gitignore",
        "ckpts/simple-cross-entropy/ema_0.9999_010000.pt",
        "ckpts/simple-student/ema_0.9999_008000.pt",
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
