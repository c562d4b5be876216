"""What the environment says of a process's place among others, whichever launcher has set it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from toy import metrics, one_sentence, train_flags

from text_diffusion import __main__ as entry
from text_diffusion import train
from text_diffusion.errors import UserError
from text_diffusion.launcher import Place, find_place, first_host


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place()),
        ({"NPROC": ""}, Place()),
        ({"NPROC": "1", "PMI_SIZE": "1", "SLURM_NTASKS": "1"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
             "MASTER_PORT": "5", "PMI_SIZE": "9", "SLURM_NTASKS": "7"},
            Place("torchrun", 3, 4, 1, 2, "h", 5),
        ),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[07-08]",
             "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            Place("srun", 2, 4, 0, 2, "n07", 20_109),
        ),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place()),
    ],
    ids=["none", "empty", "ones", "one", "torchrun", "srun", "sbatch"],
)  # fmt: skip
def test_place(env: dict[str, str], place: Place) -> None:
    assert find_place(env) == place


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NPROC": "2"}, "expected 2 processes (NPROC=2), found 1"),
        ({"NPROC": "x"}, "found NPROC=x"),
        ({"WORLD_SIZE": "2"}, "expected RANK beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": ""}, "found WORLD_SIZE="),
        ({"PMI_SIZE": "0"}, "found PMI_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "expected MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "expected a rank below 2, found 2"),
        ({"SLURM_NTASKS": "2"}, "expected SLURM_STEP_NODELIST"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n"}, "expected the variable SLURM_LOCALID"),
    ],
    ids=str,
)
def test_launchers_that_contradict_themselves(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        find_place(env)
    assert message in str(refusal.value)


def test_one_process_by_one_account_and_two_by_another() -> None:
    with pytest.raises(UserError, match="unset RANK and WORLD_SIZE"):
        find_place({"RANK": "0", "WORLD_SIZE": "1", "PMI_SIZE": "2"})


def test_variables_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PMI_SIZE", "x")
    assert entry.main(["train"]) == 1
    assert "found PMI_SIZE=x" in one_sentence(capsys.readouterr().err)


def test_library_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "text_diffusion.evaluate", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "text_diffusion.tokenizer", raising=False)
    assert entry.main(["train-word-level", "x"]) == 1
    assert "expected the libraries of requirements.txt, found" in one_sentence(capsys.readouterr().err)
    assert entry.main(["evaluate"]) == 1
    assert "Traceback" in capsys.readouterr().err, "a module of ours: not the user's fault"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a[03-07,9],b", "a03"), ("node1", "node1"), ("n[1,2]-ib", "n1-ib"), ("x,y", "x"), ("", "")],
)
def test_first_host_of_slurm(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_single_process_has_no_process_group(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("a process group"))
    assert train.main(train_flags(corpus, tmp_path, steps=1)) == 0
    assert [row["world_size"] for row in metrics(tmp_path)] == [1]


@pytest.mark.parametrize("command", ["evaluate", "likelihood", "report", "train_classifier"])
def test_what_ranks_do_not_share_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of two processes would do all of it, and write the same files."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    where = "text_diffusion.control.train_classifier" if command == "train_classifier" else f"text_diffusion.{command}"
    given = [str(tmp_path)] * (2 if command == "likelihood" else 1)
    assert importlib.import_module(where).main(given) == 1
    assert f"{command} expects one process, found 2 (torchrun)" in one_sentence(capsys.readouterr().err)
