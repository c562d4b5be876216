"""Sampling: the file, its steps, and mistakes found before the work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import (
    SRC,
    contents,
    files,
    flags,
    lines_of,
    no_file_above,
    one_sentence,
    train_flags,
    write_samples,
    write_text,
)

import text_diffusion
from text_diffusion import sample, train
from text_diffusion.config import SampleConfig
from text_diffusion.control.options import ControlConfig
from text_diffusion.flags import build
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.tokenizer import Tokenizer

# The file


def test_file(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, _ = write_samples(capsys, weights, num_samples=4, steps=5, seed=3)
    assert path == weights.parent / "ema_0.9_000200.samples_4.steps-5.clamp-no_clamp.seed-3.txt"
    assert set(files(weights.parent)) == {weights.name, path.name}
    sentences = lines_of(path)
    assert len(sentences) == 4
    assert out.splitlines() == [*sentences, f"written the decoded output to {path}"]


def test_defaults(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, _ = write_samples(capsys, weights)
    assert path.name == "ema_0.9_000200.samples_10.steps-20.clamp-no_clamp.seed-10708.txt"
    assert lines_of(path) == text_diffusion.load(str(weights)).sample() == out.splitlines()[:-1]


def test_only_the_first_sentences_are_printed(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, _ = write_samples(capsys, weights, num_samples=13)
    sentences = lines_of(path)
    assert len(sentences) == 13
    assert out.splitlines()[:-1] == [*sentences[:10], "... and 3 more"]


def test_sentences_are_clean(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = lines_of(write_samples(capsys, weights, num_samples=40)[0])
    assert len(set(sentences)) > 10
    words = {word for sentence in sentences for word in re.findall(r"\w+|[^\w\s]", sentence)}
    assert words <= {"The", ".", "is", "red", "blue", "old", "new", "raw", "apple", "fig", "pear", "egg"} | {
        "ripe", "cold", "sweet", "hot"
    }  # fmt: skip
    assert all(sentence == sentence.strip() for sentence in sentences)


def test_jsonl(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, plain_out, _ = write_samples(capsys, weights, num_samples=12, seed=4)
    path, out, _ = write_samples(capsys, weights, num_samples=12, seed=4, format="jsonl")
    assert path == plain.with_suffix(".jsonl")
    settings = {"seed": 4, "steps": 20, "sequence_len": None, "sampler": "dpm-solver++", "spacing": "auto", "eta": None}
    settings |= {"resample": None, "churn": None, "top_p": None, "clamp": False, "clamp_start": None, "halt": None}
    settings |= {"temperature": None}
    assert [json.loads(line) for line in lines_of(path)] == [
        {"text": text, "index": i, "weights": weights.name, **settings} for i, text in enumerate(lines_of(plain))
    ]
    assert out.splitlines()[:-1] == plain_out.splitlines()[:-1], "sentences on the terminal, whatever is in the file"


def test_settings_in_json_lines_have_an_order(weights: Path) -> None:
    """That of the flags, so that one command writes one text, whatever order a process keeps its sets in."""
    asked = {"length": "3-6", "want": "red", "avoid": "blue", "edit": "The red fig is raw.", "edit_strength": 0.7}
    asked |= {"template": "The [GAP]", "allow_unk": True}
    text = sample.contents(["a"], load_diffusion(weights), SampleConfig(format="jsonl"), build(ControlConfig, asked))
    order = [f.name for f in fields(ControlConfig) if f.name in asked]
    assert [name for name in json.loads(text) if name in asked] == order


def test_letters_of_any_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are, in both formats."""
    corpus, folder = write_text(tmp_path / "my.txt", ["日本語 naïve 😀"] * 3), tmp_path / "run"
    assert train.main(train_flags(corpus, folder, steps=60, lr=0.02, warmup_steps=0)) == 0
    capsys.readouterr()
    for form in ("txt", "jsonl"):
        path, out, _ = write_samples(capsys, folder / "ema_0.9_000060.pt", format=form, num_samples=2)
        assert lines_of(path)[0].count("日本語 naïve 😀") == 1
        assert out.splitlines()[0] == "日本語 naïve 😀"


def test_folder_is_made(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = write_samples(capsys, weights, out_dir=tmp_path / "a" / "b", num_samples=2)
    assert path.parent == tmp_path / "a" / "b"
    assert path.is_file()
    assert set(files(weights.parent)) == {weights.name}


def test_paths_are_relative_to_the_working_directory(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = weights.relative_to(tmp_path)
    path, _, _ = write_samples(capsys, relative, num_samples=2)
    assert (tmp_path / path).parent == weights.parent
    path, _, _ = write_samples(capsys, relative, num_samples=2, out_dir="out")
    assert (tmp_path / "out" / path.name).is_file()


def test_other_content_is_never_overwritten(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that are not in the name: the same again is the same file, others get numbers."""
    first, _, err = write_samples(capsys, weights, num_samples=20)
    assert "is there already" not in err
    kept = {first: first.read_bytes()}
    for number, top_p in enumerate((0.3, 0.6), 2):
        path, out, err = write_samples(capsys, weights, num_samples=20, top_p=top_p)
        assert path.name == first.name.replace(".txt", f".{number}.txt")
        assert f"{first.name} is there already" in err
        assert out.splitlines()[-1] == f"written the decoded output to {path}"
        kept[path] = path.read_bytes()
    assert len(set(kept.values())) == 3
    for top_p, expected in zip((0, 0.3, 0.6), kept, strict=True):
        again, _, _ = write_samples(capsys, weights, num_samples=20, top_p=top_p)
        assert again == expected
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(files(weights.parent)) == 4


def test_number_goes_before_the_ending(tmp_path: Path) -> None:
    """Of a name with dots in it, with ten files there already."""
    path = tmp_path / "ema_0.9999_1.steps-5.jsonl"
    taken = [path, *(path.with_name(f"ema_0.9999_1.steps-5.{n}.jsonl") for n in range(2, 11))]
    for i, name in enumerate(taken):
        name.write_bytes(b"%d" % i)
    assert sample.free_name(path, b"new").name == "ema_0.9999_1.steps-5.11.jsonl"
    assert sample.free_name(path, b"5") == taken[5]


def test_sentences_do_not_depend_on_how_many(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = lines_of(write_samples(capsys, weights, num_samples=40, batch_size=7)[0])
    assert lines_of(write_samples(capsys, weights, num_samples=5)[0]) == many[:5]
    assert lines_of(write_samples(capsys, weights, num_samples=40, batch_size=40)[0]) == many
    assert len(many) == 40


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"seed": 5, "steps": 3}, {"seed": 5, "steps": 3}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"clamp": "clamp"}, {"clamp": True}),
        ({"clamp": "clamp", "clamp_start": 5}, {"clamp": True, "clamp_start": 5}),
        ({"sequence_len": 5}, {"sequence_len": 5}),
        ({"batch_size": 6, "show": 0}, {}),
    ],
    ids=str,
)
def test_command_and_library_agree(
    options: dict[str, Any], arguments: dict[str, Any], weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, _ = write_samples(capsys, weights, num_samples=12, **options)
    assert lines_of(path) == text_diffusion.load(str(weights)).sample(12, **arguments)


def test_raw_weights_write_too(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = write_samples(capsys, trained / "model000006.pt", out_dir=tmp_path)
    assert path.name.startswith("model000006.samples_10.")


# Steps


def test_steps_reach_from_one_to_all(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T is 20."""
    results = set()
    for steps in (1, 2, 19, 20):
        path, _, _ = write_samples(capsys, weights, steps=steps, num_samples=20)
        assert f".steps-{steps}." in path.name
        results.add(path.read_bytes())
    assert len(results) == 4


@pytest.mark.parametrize("steps", [-1, 0, 21, 2000])
def test_other_steps_are_refused(steps: int, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(flags(model_name_or_path=weights, steps=steps)) == 1
    assert f"STEPS must be between 1 and 20, the steps that the model was trained with, found {steps}" in one_sentence(
        capsys.readouterr().err
    )
    assert set(files(weights.parent)) == {weights.name}


def test_default_steps_are_at_most_those_of_training(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(train_flags(corpus, tmp_path, steps=1, diffusion_steps=7)) == 0
    path, _, _ = write_samples(capsys, tmp_path / "model000001.pt")
    assert ".steps-7." in path.name
    assert sample.main(flags(model_name_or_path=tmp_path / "model000001.pt", steps=20)) == 1


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_len": 2}, "SEQ_LEN must be between 3 and 8, the model's, found 2"),
        ({"sequence_len": 9}, "SEQ_LEN must be between 3 and 8, the model's, found 9"),
        ({"clamp": "Clamp"}, "argument --clamp: invalid choice: 'Clamp'"),
        ({"clamp": "True"}, "argument --clamp: invalid choice: 'True'"),
        ({"clamp_start": 5}, "expects clamp to be on, found it off"),
        ({"top_p": -0.5}, "--top_p must be at least 0, found -0.5"),
        ({"num_samples": 0}, "--num_samples must be at least 1, found 0"),
        ({"format": "csv"}, "argument --format: invalid choice: 'csv'"),
        ({"device": "cuda" if not torch.cuda.is_available() else "mps"}, "expects such a device, found none"),
        ({"model_name_or_path": ""}, "CKPT must name a weights file (--model_name_or_path), found nothing"),
    ],
    ids=str,
)
def test_mistakes(options: dict[str, Any], message: str, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(flags(**{"model_name_or_path": weights} | options)) == 1
    out, err = capsys.readouterr()
    assert message in one_sentence(err)
    assert out == ""
    assert set(files(weights.parent)) == {weights.name}


def test_missing_checkpoint_lists_those_that_are_there(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = weights.with_name("ema_0.9_025000.pt")
    assert sample.main(flags(model_name_or_path=missing)) == 1
    error = one_sentence(capsys.readouterr().err)
    assert error == f"error: {missing}: expected a checkpoint, found only these in {weights.parent}: {weights.name}"


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_unwritable_folder_is_found_before_the_work(
    name: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(TextDiffusion, "decode", lambda *_, **__: pytest.fail("the work began"))
    assert sample.main(flags(model_name_or_path=weights, out_dir=tmp_path / name)) == 1
    assert f"{tmp_path / name}: expected a folder to write to" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("options", [{"steps": 21}, {"sequence_len": 9}, {"clamp_start": 1}], ids=str)
def test_mistakes_make_no_folder(
    options: dict[str, Any], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(flags(model_name_or_path=weights, out_dir=tmp_path / "new", **options)) == 1
    assert not (tmp_path / "new").exists()


def test_ctrl_c(weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TextDiffusion, "denoising", interrupted)
    assert sample.main(flags(model_name_or_path=weights)) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert set(files(weights.parent)) == {weights.name}


def test_full_disk_leaves_no_empty_folder(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with no_file_above(0):
        assert sample.main(flags(model_name_or_path=weights, show=0, out_dir=tmp_path / "new" / "below")) == 1
    assert "cannot be written" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_ctrl_c_leaves_no_empty_folder(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TextDiffusion, "decode", interrupted)
    for name in ("new", "new/and/below"):
        assert sample.main(flags(model_name_or_path=weights, show=0, out_dir=tmp_path / name)) == 130
        assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    assert sample.main(flags(model_name_or_path=weights, show=0, out_dir=tmp_path / "new" / "a" / "b")) == 130
    assert list(tmp_path.rglob("new*")) == [tmp_path / "new"], "what was there stays"
    assert list((tmp_path / "new").iterdir()) == []


def test_ctrl_c_while_the_libraries_are_loaded(tmp_path: Path) -> None:
    """PyTorch takes seconds to load; this one takes longer."""
    (tmp_path / "torch.py").write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SRC}"}
    command = [sys.executable, "-m", "text_diffusion", "train"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What a background job of a shell starts ignores Ctrl-C, these tests too: this process must not.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=variables, preexec_fn=heeding, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


# The library


def test_load_takes_what_the_file_says(weights: Path) -> None:
    model = load_diffusion(weights)
    assert not model.model.training
    assert model.sequence_len == 8
    assert model.diffusion.num_timesteps == 20
    assert model.info["step"] == 200
    assert model.info["ema_rate"] == 0.9
    assert "state" not in model.info
    own = Tokenizer.from_json(contents(weights)["tokenizer"])
    assert model.tokenizer.encode(["The red fig."]) == own.encode(["The red fig."])


def test_library_raises_value_errors(weights: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint"):
        text_diffusion.load(str(weights.with_name("none.pt")))
    with pytest.raises(ValueError, match="--device mps expects such a device"):
        text_diffusion.load(str(weights), device="mps")


def test_output_path() -> None:
    config = SampleConfig(model_name_or_path="a/b/model1.5.pt", clamp="clamp", steps=7, num_samples=3, seed=1)
    assert sample.output_path(config) == Path("a/b/model1.5.samples_3.steps-7.clamp-clamp.seed-1.txt")
    elsewhere = SampleConfig(model_name_or_path="x.pt", out_dir="c", format="jsonl")
    assert sample.output_path(elsewhere) == Path("c/x.samples_10.steps-50.clamp-no_clamp.seed-10708.jsonl")
