"""The flags of steering, on the command line of sampling."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from test_flag_values import bad_values
from test_flags import Case, observe_sampling
from toy import files, flags, one_sentence, same, write_text

from text_diffusion import sample
from text_diffusion.control.options import ControlConfig

GUIDED = {"classifier": "CLASSIFIER", "label": "red"}
CASES = {
    "template": Case("The [GAP] fig is [GAP].", "sentences"),
    "template_file": Case("TEMPLATES", "sentences"),
    "allow_unk": Case(True, "error", {"template": "The purple fig is hot."}),
    "length": Case("4", "sentences"),
    "want": Case("egg", "sentences"),
    "avoid": Case("The", "sentences"),
    "edit": Case("The red fig is ripe.", "sentences"),
    "edit_strength": Case(0.9, "sentences", {"edit": "The red fig is ripe."}),
    "label": Case("red", "sentences", {"classifier": "CLASSIFIER"}),
    "guidance_scale": Case(3.0, "error", {"label": "red"}),  # of a model without labels; else see test_condition
    "source_file": Case("TEMPLATES", "error"),  # the same
    "mbr": Case(2, "error"),  # the same
    "classifier": Case("/nowhere", "error", {"label": "red"}),
    "guidance_strength": Case(0.05, "sentences", GUIDED),
    "guidance_range": Case("0-8", "sentences", GUIDED),
    "inner_steps": Case(2, "sentences", GUIDED),
    "inner_lr": Case(0.5, "sentences", GUIDED | {"inner_steps": 2}),
    "langevin": Case(True, "sentences", GUIDED | {"inner_steps": 2, "sampler": "ancestral"}),
}


def test_table_is_complete() -> None:
    assert list(CASES) == [f.name for f in fields(ControlConfig)]


@pytest.mark.parametrize("name", list(CASES))
def test_flag_has_an_effect(
    name: str, writer: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    templates = write_text(tmp_path / "templates.txt", ["The red [GAP]", "[GAP] is hot."])
    paths = {"TEMPLATES": templates, "CLASSIFIER": classifier}
    case = CASES[name]
    seen = []
    for options in (case.beside, case.beside | {name: case.value}):
        if list(options) == ["classifier"]:
            options = {}  # without a label it is an error by itself
        named = {key: paths.get(str(value), value) for key, value in options.items()}
        usual = {"model_name_or_path": writer, "num_samples": 8, "steps": 5, "out_dir": tmp_path / "out"}
        seen.append(observe_sampling(flags(**usual | named), capsys))
    assert not same(seen[0].get(case.changes), seen[1].get(case.changes))


def run(capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """The lines of the file that sampling wrote."""
    assert sample.main(flags(**options)) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("written the decoded output to "))
    return path.read_text(encoding="utf-8").splitlines()


def test_templates_of_a_file(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So many of each, in the order of the file, and no two from the same noise."""
    templates = ["The red [GAP]", "[GAP] is hot.", "The old fig is raw."]
    usual = {"model_name_or_path": writer, "num_samples": 3, "out_dir": tmp_path}
    templates[2] = "The old fig is hot."
    path = write_text(tmp_path / "templates.txt", templates)
    lines = run(capsys, **usual, template_file=path)
    assert len(lines) == 9
    assert lines[:3] == run(capsys, **usual, template=templates[0])
    assert all(line.startswith("The red ") for line in lines[:3])
    assert all(line.endswith(" is hot.") for line in lines[3:6])
    assert lines[6:] == ["The old fig is hot."] * 3
    again = write_text(tmp_path / "again.txt", ["The [GAP] is [GAP]."] * 3)
    found = run(capsys, **usual, template_file=again)
    assert found == run(capsys, **usual | {"num_samples": 9}, template="The [GAP] is [GAP].")
    assert len(set(found)) > 3
    assert lines[6:] == [templates[2]] * 3


def test_words_are_taken_as_they_are_written(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = {"model_name_or_path": writer, "num_samples": 20, "out_dir": tmp_path}
    for line in run(capsys, **usual, want="egg@3, blue", avoid="hot,cold@5", length="5"):
        assert re.fullmatch(r"\S+ blue egg \S+ (?!cold)\S+", line) or "blue" in line
        assert line.split()[2].startswith("egg")
        assert "hot" not in line
        assert not line.split()[4].startswith("cold")
    (row,) = run(capsys, **usual | {"num_samples": 1}, format="jsonl", want="egg", length="4-6")
    about = json.loads(row)
    assert about["want"] == "egg"
    assert about["length"] == "4-6"
    assert "avoid" not in about
    assert 4 <= len(about["text"].split()) <= 6


BAD = [
    *bad_values(ControlConfig),
    ("length", "x"),
    ("length", "-3"),
    ("length", "3-x"),
    ("template_file", "/nowhere/templates.txt"),
    ("want", "purple"),
    ("want", "red,,blue"),
    ("avoid", "purple"),
    ("edit", "The purple fig"),
    ("edit_strength", "0.3"),
    ("allow_unk", "True"),
    ("label", "green"),
    ("classifier", "a.pt"),
    ("guidance_strength", "3"),
    ("guidance_range", "0-5"),
    ("inner_steps", "2"),
    ("inner_lr", "0.3"),
    ("langevin", "True"),
    ("want", ""),
    ("template", ""),
    ("label", ""),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_refused(name: str, value: str, writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*flags(model_name_or_path=writer, out_dir=tmp_path / "out"), f"--{name}={value}"]
    assert sample.main(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert name.replace("_", "") in one_sentence(err).replace("_", "") or value in err
    assert files(tmp_path) == {}


def test_an_edit_takes_no_more_steps_than_it_has_levels(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless somebody says how many."""
    usual = {"model_name_or_path": writer, "num_samples": 2, "out_dir": tmp_path, "edit": "The red fig is hot."}
    assert len(run(capsys, **usual, edit_strength=0.2)) == 2
    assert ["steps-4" in path.name for path in tmp_path.iterdir()] == [True]
    assert sample.main(flags(**usual, edit_strength=0.2, steps=10)) == 1
    assert "STEPS must be between 1 and 4, the levels of noise that --edit_strength leaves" in one_sentence(
        capsys.readouterr().err
    )


def test_contradictions_are_found_before_the_work(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the last template of a file."""
    path = write_text(tmp_path / "templates.txt", ["The red [GAP]", "The old fig is very hot [GAP]"])
    usual = {"model_name_or_path": writer, "out_dir": tmp_path / "out"}
    for given, message in (
        ({"template": "a b c d [GAP:2]", "length": 3}, "does not know: a, b, c, d"),
        ({"template": "The red fig is [GAP:2]", "length": 3}, "--length 3 contradicts --template"),
        ({"template_file": path, "length": 4}, "words that the model does not know: very"),
        ({"template_file": path, "template": "The [GAP]"}, "exclude each other"),
        ({"want": "red", "avoid": "red"}, "--avoid red contradicts --want red"),
    ):
        assert sample.main(flags(**usual, **given)) == 1
        assert message in one_sentence(capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (GUIDED | {"label": "green"}, "must be one that the classifier knows: blue, new, old, raw, red; found 'green'"),
        (GUIDED | {"label": "red|green"}, "the classifier knows: blue, new, old, raw, red; found 'green'"),
        (GUIDED | {"model_name_or_path": "OTHER"}, "expected a classifier of these weights, found that of ema_0.9_"),
        ({"template": "The red fig is hot and [GAP]"}, "does not know: and; leave them out, or take them as unknown"),
        ({"template": "The purple fig is mild."}, "words that the model does not know: purple, mild; leave them out"),
        ({"template": "The purple fig.", "allow_unk": True}, "--allow_unk expects a model that met unknown words"),
        ({"template": "The red fig is hot. The red fig."}, "must fit into 8 tokens, the length of the model's sen"),
        ({"template": "The [GAP] is [GAP:7]"}, "must fit into 8 tokens, the length of the model's sentences, found at"),
        ({"template": "The red [GAP:2] is hot.", "length": 3}, "--length 3 contradicts --template 'The red [GAP:2]"),
        ({"length": "5-3"}, "--length must be a number of words from 1, or a range such as 4-7, found 5-3"),
        ({"length": "0"}, "--length must be a number of words from 1, or a range such as 4-7, found 0"),
        ({"length": 30}, "--length 30 must fit into 8 tokens"),
        ({"length": 1, "want": "red,fig"}, "no sentence satisfies --length 1 and --want red and --want fig: they"),
        ({"want": "red@2", "template": "The blue [GAP]"}, "no sentence satisfies --template 'The blue [GAP]' and --w"),
        ({"want": "red@2,blue@2"}, "--want blue@2 contradicts --want red@2"),
        ({"avoid": "fig", "template": "The [GAP] fig is hot."}, "--avoid fig contradicts --template, which has that"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_of_the_command(
    given: dict[str, Any], message: str, writer: Path, trained: Path, classifier: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A sentence that names what was wrong and what would be right, before a folder is made."""
    paths = {"CLASSIFIER": classifier, "OTHER": trained / "ema_0.9_000006.pt"}
    named = {name: paths.get(str(value), value) for name, value in given.items()}
    assert sample.main(flags(**{"model_name_or_path": writer, "out_dir": tmp_path / "out"} | named)) == 1
    assert message in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == {}
    assert not (tmp_path / "out").exists()


def test_help_has_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    out = capsys.readouterr().out
    assert [f.name for f in fields(ControlConfig) if f"--{f.name} " not in out] == []
