"""The teacher of `evaluate --checkpoint`: bits of whole lines and of their tokens, whoever wrote them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import LINES, SIZES, flags, one_sentence, write_text

from text_diffusion import evaluate, train
from text_diffusion.autoregressive import Autoregressive
from text_diffusion.generation import load
from text_diffusion.teacher import Teacher, load_teacher


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A teacher that knows the toy corpus; its sentences end at a [SEP] in the last of 7 places or before."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    options = {"steps": 200, "lr": 1e-2, "hidden_size": 32, "objective": "autoregressive", "sequence_len": 9}
    left_to_right = {name: value for name, value in SIZES.items() if name not in ("num_channels", "diffusion_steps")}
    assert train.main(flags(dataset=corpus, checkpoint_path=folder, **left_to_right | options)) == 0
    return folder / "ema_0.9_000200.pt"


@torch.no_grad()
def test_bits_are_those_of_the_words_one_by_one(weights: Path) -> None:
    """An independent way: one line alone, one word after the other, without pads."""
    writer = load(weights, device="cpu")
    assert isinstance(writer, Autoregressive)
    lines = [LINES[0], "The red apple", LINES[7]]
    bits, tokens = Teacher(writer)(lines)
    for line, found, count in zip(lines, bits, tokens, strict=True):
        (ids,) = writer.tokenizer.encode([line])
        expected = 0.0
        for place in range(1, len(ids)):
            scores = writer.model(torch.tensor([ids[:place]]))[0, -1].double()
            expected -= float(scores.log_softmax(0)[ids[place]]) / math.log(2)
        assert found == pytest.approx(expected, rel=1e-4)
        assert count == len(ids) - 1
    assert bits[1] > bits[0] + 3  # no sentence ends there


def test_long_and_unknown_lines_are_reported(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits, tokens = load_teacher(str(weights))(["red " * 30, "zzz zzz", ""])
    assert tokens.tolist() == [8, 3, 1]
    assert np.isfinite(bits).all()
    err = capsys.readouterr().err
    assert "of 1 lines the teacher reads only the first 8 tokens" in err
    assert "are unknown to the teacher" in err


def test_command_has_a_perplexity(weights: Path, tmp_path: Path) -> None:
    """Real text costs what one of 76 equally likely sentences costs; shuffled words cost more, and are worse."""
    rng = np.random.default_rng(0)
    shuffled = write_text(tmp_path / "shuffled.txt", [" ".join(rng.permutation(line.split())) for line in LINES])
    reference, out = write_text(tmp_path / "reference.txt", LINES), tmp_path / "out.json"
    options = ("--reference", str(reference), "--checkpoint", str(weights), "--json", str(out))
    assert evaluate.main([str(shuffled), *options]) == 0
    read = json.loads(out.read_text())
    figure = read["figures"]["perplexity"]
    assert figure["real"]["value"] == pytest.approx(2 ** (math.log2(76) / 6), rel=0.15)
    assert figure["samples"]["low"] > 2 * figure["real"]["high"]
    assert "perplexity" in read["worse"]
    assert read["teacher"] == str(weights)


def test_a_diffusion_model_is_no_teacher(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt", LINES)
    assert evaluate.main([str(text), "--reference", str(text), "--checkpoint", str(writer)]) == 1
    assert "expected a teacher, which writes left to right" in one_sentence(capsys.readouterr().err)
    assert evaluate.main([str(text), "--reference", str(text), "--checkpoint", str(tmp_path / "none.pt")]) == 1
    assert "expected a checkpoint" in one_sentence(capsys.readouterr().err)
