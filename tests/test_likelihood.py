"""The command: its figures are those of the functions, its flags do what they say, its errors are sentences."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import LINES, SIZES, flags, one_sentence, write_text

from text_diffusion import likelihood, train
from text_diffusion.bound import log_decoder, path_terms, walk
from text_diffusion.config import LikelihoodConfig
from text_diffusion.generation import load_diffusion
from text_diffusion.randomness import Stream, draw, normal

GRAMMAR = {
    "template": "The {colour} {food} is {state}.",
    "slots": {
        "colour": dict.fromkeys(("red", "blue", "old", "new", "raw"), 0.2),
        "food": dict.fromkeys(("apple", "fig", "pear", "egg"), 0.25),
        "state": dict.fromkeys(("ripe", "cold", "sweet", "hot"), 0.25),
    },
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", LINES[:12])


@pytest.fixture
def grammar(tmp_path: Path) -> Path:
    path = tmp_path / "grammar.json"
    path.write_text(json.dumps(GRAMMAR))
    return path


def run(writer: Path, text: Path, **options: Any) -> dict[str, Any]:
    """The figures of the command."""
    figures = text.parent / "figures.json"
    assert likelihood.main([str(writer), str(text), *flags(**{"json": figures} | options)]) == 0
    found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return found


def test_figures_are_whole(writer: Path, text: Path, grammar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(writer, text, paths=3, flow="exact", flow_steps=1, grammar=grammar)
    out = capsys.readouterr().out
    means = {name: mean["bits_per_sentence"] for name, mean in found["means"].items()}
    assert list(means) == [
        *("reconstruction", "kl", "prior", "bound", "importance_sampled"),
        *("flow_bound", "flow_importance_sampled", "true", "gap"),
    ]
    assert means["true"] == pytest.approx(6.3219, abs=1e-3)  # 5 x 4 x 4 sentences
    assert means["gap"] == pytest.approx(means["bound"] - means["true"], abs=1e-4)
    assert means["importance_sampled"] < means["bound"]
    assert means["flow_importance_sampled"] < means["flow_bound"]
    steps = found["steps"]
    assert steps["timesteps"] == list(range(20))
    assert sum(steps["kl"][:-1]) == pytest.approx(means["kl"], rel=1e-4)
    assert steps["kl"][-1] == pytest.approx(means["prior"], abs=1e-5)
    assert found["tokens"] == 12 * 7  # five words, the full stop, [SEP]
    assert found["means"]["bound"]["bits_per_token"] == pytest.approx(means["bound"] / 7, rel=1e-5)
    assert [line["text"] for line in found["lines"]] == LINES[:12]
    for name in means:
        assert sum(line[name] for line in found["lines"]) / 12 == pytest.approx(means[name], rel=1e-4, abs=1e-6)
        assert f"{means[name]:.3f}" in out


def test_neither_batches_nor_other_lines_change_a_line(writer: Path, text: Path) -> None:
    options = {"paths": 2, "flow": "hutchinson", "flow_steps": 3, "probes": 2}
    whole, parts = run(writer, text, **options), run(writer, text, batch_size=5, lines=7, **options)
    for ours, theirs in zip(parts["lines"], whole["lines"], strict=False):
        names = [name for name in ours if name != "text"]
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-3, abs=1e-3)
    assert len(parts["lines"]) == 7


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "steps": (7, "bound", {}),
    "paths": (2, "bound", {}),
    "estimate": ("fresh", "bound", {}),
    "flow": ("exact", "flow_bound", {"flow": "hutchinson", "flow_steps": 2}),
    "flow_steps": (3, "flow_bound", {"flow": "exact", "flow_steps": 2}),
    "probes": (2, "flow_bound", {"flow": "hutchinson", "flow_steps": 2}),
    "lines": (5, "bound", {}),
    "grammar": ("GRAMMAR", "true", {}),
    "seed": (1, "bound", {}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_flag_has_an_effect(name: str, writer: Path, text: Path, grammar: Path) -> None:
    value, changes, beside = CASES[name]
    value = grammar if value == "GRAMMAR" else value
    before, after = (run(writer, text, **options)["means"].get(changes) for options in (beside, beside | {name: value}))
    assert before != after


def test_table_of_flags_is_complete() -> None:
    elsewhere = {"json", "batch_size", "tokenizer", "device", "gpu"}
    assert CASES.keys() | elsewhere == {f.name for f in fields(LikelihoodConfig)}


def test_bits_are_those_of_the_library(writer: Path, text: Path) -> None:
    """One path of the second line, walked here."""
    model = load_diffusion(writer)
    read = likelihood.read_text(text, model.tokenizer, model.sequence_len, 0)
    handover = run(writer, text)["steps"]["handover"]
    terms = likelihood.walk_terms(model, model.diffusion, read.ids[1:2], handover, 1, 0, 0, lambda: None)
    assert run(writer, text)["lines"][1]["bound"] == pytest.approx(-float(terms.log_weight) / likelihood.BIT, rel=1e-4)
    assert torch.isfinite(terms.kl).all()


def test_fresh_estimates_are_those_of_a_network_that_is_asked_twice(writer: Path, text: Path) -> None:
    """It sees its own estimate at the same noise, whatever the step before said."""
    model = load_diffusion(writer)
    ids = likelihood.read_text(text, model.tokenizer, model.sequence_len, 2).ids
    found = likelihood.walk_terms(model, model.diffusion, ids, 3, 0, 0, 0, lambda: None, fresh=True)

    def denoise(x: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        time = model.diffusion.network_time(t)
        twice: Tensor = model.model(x, time, model.model(x, time))
        return twice

    E = model.model.get_embeds(ids)

    def noise(s: int) -> Tensor:
        return draw(normal, (0, Stream.LIKELIHOOD, 0, s), 0, 2, tuple(E.shape[1:]), ids.device)

    posterior = likelihood.posterior_of(model, model.diffusion)
    with torch.no_grad():
        drawn = walk(denoise, model.diffusion, posterior, E, noise, 3)
        expected = path_terms(drawn, lambda xhat: log_decoder(model.model, ids, xhat))
    assert torch.allclose(found.log_weight, expected.log_weight, rtol=1e-5)
    carried = likelihood.walk_terms(model, model.diffusion, ids, 3, 0, 0, 0, lambda: None)
    assert not torch.allclose(found.log_weight, carried.log_weight, rtol=1e-5)


def test_a_model_of_words_is_asked_twice(
    corpus: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless asked for otherwise; one without self-conditioning never."""
    own: dict[str, Any] = SIZES | {"objective": "cross_entropy", "steps": 2, "sequence_len": 9}
    del own["diffusion_steps"]
    for name, more in (("with", {}), ("without", {"self_condition": False})):
        assert train.main(flags(dataset=corpus, checkpoint_path=tmp_path / name, **own | more)) == 0
    weights, plain = (tmp_path / name / "model000002.pt" for name in ("with", "without"))
    chosen, fresh, carried = (run(weights, text, steps=20, estimate=how) for how in ("auto", "fresh", "carried"))
    assert chosen["means"] == fresh["means"]
    assert chosen["means"] != carried["means"]
    assert [found["estimate"] for found in (chosen, carried)] == ["fresh", "carried"]
    assert run(plain, text, steps=20)["estimate"] == "carried"
    capsys.readouterr()
    assert likelihood.main([str(plain), str(text), "--estimate", "fresh"]) == 1
    assert "--estimate is about self-conditioning, which" in one_sentence(capsys.readouterr().err)


def test_long_and_unknown_lines_are_reported(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "mixed.txt", [LINES[0], "The red red red red red red apple.", "The zzz fig is hot."])
    found = run(writer, text, steps=3)
    assert [line["text"] for line in found["lines"]] == [LINES[0], "The zzz fig is hot."]
    err = capsys.readouterr().err
    assert "1 lines longer than" in err
    assert "are unknown" in err


def test_one_line_has_no_standard_error(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(writer, write_text(tmp_path / "one.txt", LINES[:1]), steps=3)
    assert found["means"]["bound"]["standard_error"] is None
    assert "±" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 21}, "--steps must be at most 20"),
        ({"steps": -1}, "--steps must be at least 0"),
        ({"paths": 0}, "--paths must be at least 1"),
        ({"flow_steps": 3}, "--flow_steps belongs to --flow exact or hutchinson"),
        ({"probes": 3, "flow": "exact"}, "--probes belongs to --flow hutchinson"),
        ({"flow": "nonsense"}, "--flow"),
        ({"grammar": "none.json"}, "expected a grammar file"),
        ({"grammar": "OTHER"}, "expected lines of this grammar, found 'The red apple is ripe.'"),
        ({"nonsense": 1}, "--help"),
    ],
)
def test_bad_flags(
    options: dict[str, Any], expected: str, writer: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"template": "A {x}.", "slots": {"x": {"b": 1.0}}}))
    named = {name: other if value == "OTHER" else value for name, value in options.items()}
    assert likelihood.main([str(writer), str(text), *flags(json=tmp_path / "x" / "y.json", **named)]) == 1
    assert expected in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_the_text_is_not_written_over(writer: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = text.read_bytes()
    assert likelihood.main([str(writer), str(text), *flags(json=text)]) == 1
    assert "expected a file of its own to write to, found one that is read" in one_sentence(capsys.readouterr().err)
    assert text.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", None, b"The red red red red red red red apple.\n"])
def test_bad_texts(content: bytes | None, writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert likelihood.main([str(writer), str(path)]) == 1
    assert str(path) in one_sentence(capsys.readouterr().err)
