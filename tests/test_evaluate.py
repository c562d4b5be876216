"""`evaluate`: what is good comes out as good, what is bad as bad and by name; bad input ends in a sentence."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import one_sentence, write_text

from text_diffusion import embedding, evaluate, figures
from text_diffusion.figures import FIGURES, Estimate, Evaluation, Row
from text_diffusion.grammar import Grammar

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


@pytest.fixture(autouse=True)
def _fewer_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals that are less exact, in a fifth of the time."""
    monkeypatch.setattr(figures, "HALVES", 20)


@pytest.fixture(scope="module")
def animals() -> Grammar:
    return Grammar.load(DATA / "animals" / "grammar.json")


@pytest.fixture(scope="module")
def real(animals: Grammar) -> list[str]:
    return animals.sample(1200, np.random.default_rng(0))


def sampled(animals: Grammar, n: int, seed: int) -> list[str]:
    return animals.sample(n, np.random.default_rng(seed))


def worse(result: Evaluation) -> list[str]:
    return [row.figure.key for row in result.rows if row.worse]


def teacher(lines: Any) -> tuple[Any, Any]:
    """A bit for each letter, a token for each word."""
    return np.array([float(len(line)) for line in lines]), np.array([len(line.split()) for line in lines])


# What the figures say


def test_an_ideal_sampler_is_told_from_nothing(animals: Grammar, real: list[str]) -> None:
    result = figures.evaluate(sampled(animals, 1000, 1), real, train=real[:0], grammar=animals)
    assert worse(result) == []
    assert (
        evaluate.verdict(result)
        == f"no figure of {len(result.rows)} tells these samples from an ideal sampler or real text"
    )
    assert result.row("valid").samples.value == 1
    assert {row.figure.key for row in result.rows} == FIGURES.keys() - {"perplexity"}


def test_false_alarms_are_rare(animals: Grammar, real: list[str]) -> None:
    """Of 10 ideal samplers at most 1 is called worse: two intervals that do not meet are rarer than 1 in 100."""
    alarms = [bool(worse(figures.evaluate(sampled(animals, 300, seed), real, grammar=animals))) for seed in range(10)]
    assert sum(alarms) <= 1


@pytest.mark.parametrize(
    ("cheat", "caught_by"),
    [
        ("copies", {"novel"}),
        ("one sentence", {"unique", "entropy", "distinct_2", "self_bleu", "js_1", "slot_kl", "mauve", "energy"}),
        ("independent words", {"valid", "mutual_information", "js_2", "js_3", "distinct_2"}),
        ("short", {"length", "valid"}),
        ("stuttering", {"repetition", "valid", "js_2"}),
        ("half blank", {"blank"}),
    ],
)
def test_cheats_are_caught_by_name(animals: Grammar, real: list[str], cheat: str, caught_by: set[str]) -> None:
    rng = np.random.default_rng(2)
    train = sampled(animals, 1000, 3)
    texts = {
        "copies": train[:600],
        "one sentence": train[:1] * 600,
        "independent words": animals.decode(rng.permuted(animals.sample_ids(600, rng), axis=0)),
        "short": [" ".join(line.split()[:5]) for line in sampled(animals, 600, 4)],
        "stuttering": [f"{line} {line}" for line in sampled(animals, 600, 4)],
        "half blank": [*sampled(animals, 300, 4), *[""] * 300],
    }
    result = figures.evaluate(texts[cheat], real, train=train, grammar=animals)
    assert caught_by <= set(worse(result))
    verdict = evaluate.verdict(result)
    assert verdict.startswith("worse than ")
    assert f" on {len(worse(result))} of {len(result.rows)} figures: " in verdict
    assert all(key in verdict for key in caught_by)


def test_ideal_figures_are_what_ideal_samples_have(animals: Grammar, real: list[str]) -> None:
    """The mean over 10 texts is within 5 of its standard errors of what is expected."""
    expected = figures.ideal_figures(animals, 400, real, np.random.default_rng(0))
    texts = [sampled(animals, 400, seed) for seed in range(100, 110)]
    ids = [animals.encode(text) for text in texts]
    found = {
        "valid": [float(np.isfinite(animals.log2_probs(rows)).mean()) for rows in ids],
        "slot_kl": [animals.slot_kl_bits(rows) for rows in ids],
        "mutual_information": [animals.mutual_information_bits(rows) for rows in ids],
        "unique": [len(set(text)) / 400 for text in texts],
        "novel": [sum(line not in set(real) for line in text) / 400 for text in texts],
    }
    assert found.keys() == expected.keys()
    for key, ideal in expected.items():
        error = np.std(found[key], ddof=1) / 10**0.5 + (ideal.high - ideal.low) / 2
        assert np.mean(found[key]) == pytest.approx(ideal.value, abs=5 * float(error) + 1e-12), key


def test_perplexity_is_of_all_tokens(real: list[str]) -> None:
    result = figures.evaluate(real[:100], real, scorer=teacher)
    bits, tokens = teacher(real[:100])
    assert result.row("perplexity").samples.value == pytest.approx(2 ** (bits.sum() / tokens.sum()))


def test_figures_that_depend_on_size_are_of_equally_many_lines(real: list[str]) -> None:
    """5,000 lines beside 100: distinct-n, say, would be far lower for the longer text alone."""
    many = figures.evaluate(real * 4, real[:200])
    assert not {"distinct_1", "distinct_2", "distinct_3", "entropy", "js_1"} & set(worse(many))


def test_halves_are_of_whole_runs() -> None:
    """Nothing is lost or in both halves, and of 100 topics of 10 neighbours each, at most one a run is on two sides."""
    rows = np.arange(1000)
    halves = figures.halves_of(rows, 10, np.random.default_rng(0))
    assert np.sort(np.concatenate(halves)).tolist() == rows.tolist()
    assert [len(half) for half in halves] == [500, 500]
    assert len(set(halves[0] // 10) & set(halves[1] // 10)) <= 10
    assert figures.halves_of(rows, 10, np.random.default_rng(1))[0].tolist() != halves[0].tolist()
    assert [half.tolist() for half in figures.halves_of(rows[:1], 10, np.random.default_rng(0))] == [[], [0]]


def test_same_seed_same_figures(real: list[str]) -> None:
    first, second, other = (evaluate.as_json(figures.evaluate(real[:100], real[100:400], seed=s)) for s in (0, 0, 1))
    assert first == second != other


@pytest.mark.parametrize(
    ("good", "samples", "expected"),
    [
        ("high", (0.1, 0.3), True),
        ("high", (0.3, 0.5), False),
        ("high", (0.7, 0.9), False),
        ("low", (0.1, 0.3), False),
        ("low", (0.7, 0.9), True),
        ("real", (0.1, 0.3), True),
        ("real", (0.5, 0.6), False),
        ("real", (0.7, 0.9), True),
    ],
)
def test_worse_is_on_the_bad_side_with_intervals_apart(good: str, samples: tuple[float, float], expected: bool) -> None:
    figure = next(figure for figure in FIGURES.values() if figure.good == good)
    low, high = samples
    bar = Estimate(0.5, 0.4, 0.6)
    assert Row(figure, Estimate((low + high) / 2, low, high), bar, None).worse is expected
    assert Row(figure, Estimate((low + high) / 2, low, high), Estimate(0, 0, 9), bar).worse is expected  # ideal first


# What is left out


def test_left_out_by_name(real: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the core requirements, about a language that is not known: everything else is still there."""
    original = builtins.__import__

    def without_extra(name: str, *rest: Any) -> Any:
        if name == "wordllama":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_extra)
    embedding._model.cache_clear()
    result = figures.evaluate(real[:300], real)
    named = {"valid", "slot_kl", "mutual_information", "novel", "energy", "mauve", "perplexity"}
    assert result.left_out.keys() == named
    assert {row.figure.key for row in result.rows} == FIGURES.keys() - named
    assert "pip install '.[eval]'" in result.left_out["mauve"]
    assert "--train FILE" in result.left_out["novel"]
    assert "left out: energy, mauve: wordllama is not there" in evaluate.as_text(result)


@pytest.mark.parametrize(
    ("samples", "reference"), [(1, 400), (19, 400), (400, 1), (400, 30)], ids=["one line", "few", "no real", "few real"]
)
def test_too_few_lines_are_left_out(animals: Grammar, real: list[str], samples: int, reference: int) -> None:
    result = figures.evaluate(sampled(animals, samples, 1), real[:reference], train=real, grammar=animals)
    if samples < 20:
        assert result.rows == []
        lines = "1 line" if samples == 1 else f"{samples} lines"
        assert evaluate.verdict(result).startswith(f"nothing can be told from {lines}, beside")
    else:  # an ideal sampler is there to compare with
        assert {row.figure.key for row in result.rows} == {"valid", "slot_kl", "mutual_information", "unique", "novel"}
    assert result.left_out["js_2"] == "needs 20 lines of samples, and twice as many of the reference"
    evaluate.as_text(result)


def test_what_cannot_be_counted_is_left_out(animals: Grammar, real: list[str]) -> None:
    """Lines of one word have no pairs, and not the language's shape: no figure is nan."""
    result = figures.evaluate(["Anna"] * 300, real, grammar=animals)
    assert {"slot_kl", "mutual_information", "distinct_2", "repetition"} <= result.left_out.keys()
    assert result.left_out["slot_kl"].startswith("nothing to count")
    json.dumps(evaluate.as_json(result), allow_nan=False)
    assert {"valid", "unique", "length", "js_1"} <= set(worse(result))


def test_all_blank_but_one(animals: Grammar, real: list[str]) -> None:
    result = figures.evaluate(["", " ", *[""] * 50, real[0]], real, grammar=animals)
    assert [row.figure.key for row in result.rows] == ["blank"]
    assert worse(result) == ["blank"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [(str.upper, "upper and lower case differ"), (lambda line: "▁".join(line), "another language or tokenisation")],
)
def test_warns_of_another_tokenisation(real: list[str], change: Any, expected: str) -> None:
    result = figures.evaluate([change(line) for line in real[:50]], real)
    assert len(result.warnings) == 1
    assert expected in result.warnings[0]
    assert f"warning: {result.warnings[0]}" in evaluate.as_text(result)
    assert figures.evaluate(real[:50], real).warnings == []


def test_punctuation_by_itself_is_no_other_tokenisation(real: list[str]) -> None:
    spaced = [line.replace(",", " ,").replace(".", " .") for line in real[:600]]
    result = figures.evaluate(spaced, real[600:])
    assert result.warnings == []
    assert not {"entropy", "js_1", "js_2", "length"} & set(worse(result))


# The command


def run(*arguments: object) -> int:
    return evaluate.main([str(argument) for argument in arguments])


def test_command_writes_table_json_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The language is found by the name of the reference; JSON and Markdown say what the terminal says."""
    out, table = tmp_path / "new" / "figures.json", tmp_path / "table.md"
    test, train = DATA / "simple-test.txt", DATA / "simple-train.txt"
    assert run(test, "--reference", test, "--train", train, "--json", out, "--markdown", table) == 0
    printed = capsys.readouterr().out
    assert table.read_text(encoding="utf-8") == printed
    read = json.loads(out.read_text(encoding="utf-8"))
    assert read["lines"] == 500
    assert read["figures"].keys() == FIGURES.keys() - {"perplexity"}
    assert read["figures"]["valid"]["ideal"] == {"value": 1, "low": 1, "high": 1}
    assert read["figures"]["novel"]["samples"]["value"] == 1
    assert read["verdict"] in printed
    assert set(read["worse"]) == {key for key, row in read["figures"].items() if row["worse"]}
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == len(read["figures"]) + 2
    assert len({len(row) for row in rows}) == 1  # aligned
    assert len({row.count("|") for row in rows}) == 1


def test_command_takes_json_lines(tmp_path: Path, real: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_text(tmp_path / "samples.jsonl", [json.dumps({"text": line, "seed": 1}) for line in real[:100]])
    plain = write_text(tmp_path / "samples.txt", real[:100])
    reference = write_text(tmp_path / "reference.txt", real)
    outputs = []
    for path in (lines, plain):
        assert run(path, "--reference", reference) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_escape_codes_in_samples_are_not_printed(
    tmp_path: Path, real: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_text(tmp_path / "samples.txt", ["\x1b[31m<script>alert(1)</script>\x1b[2J"] * 100)
    assert run(samples, "--reference", write_text(tmp_path / "reference.txt", real)) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "<script>" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("samples.txt", b"", "samples.txt: expected sentences, one a line, found an empty file"),
        ("samples.txt", b"\n\n\n", "found only blank lines"),
        ("samples.txt", "déjà vu\n".encode("latin-1"), "expected UTF-8, found byte 0xe9 in line 1"),
        ("samples.txt", "word\n".encode("utf-16"), "expected"),
        ("samples.jsonl", b'{"text": "a"}\n{"words": 1}\n', 'objects with a "text", found another thing in line 2'),
        ("samples.jsonl", b"[1]\n", 'objects with a "text", found another thing in line 1'),
        ("samples.jsonl", b'{"text": null}\n', 'objects with a "text", found another thing in line 1'),
        ("samples.jsonl", b"[" * 100_000, 'objects with a "text", found another thing in line 1'),
    ],
)
def test_bad_sample_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, contents: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(contents)
    out = tmp_path / "out.json"
    assert run(tmp_path / name, "--reference", DATA / "simple-test.txt", "--json", out) == 1
    assert expected in one_sentence(capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{real}"], "--reference must name a file"),
        (["{real}", "--reference", "{tmp}/none.txt"], "none.txt: expected a text file"),
        (["{tmp}/none.txt", "--reference", "{real}"], "none.txt: expected a text file"),
        (["{real}", "--reference", "{real}", "--train", "{tmp}"], "expected a text file"),
        (
            ["{real}", "--reference", "{real}", "--grammar", "{tmp}/g.json"],
            "g.json: expected the JSON file of a grammar",
        ),
        (["{real}", "--reference", "{real}", "--grammar", "{real}"], "grammar file"),
        (["{real}", "--reference", "{real}", "--json", "{tmp}"], "expected a file to write to, found a folder"),
        (["{real}", "--reference", "{real}", "--json", "{tmp}/./real.txt"], "real.txt: expected a file of its own"),
        (["{real}", "--reference", "{real}", "--seed", "-1"], "--seed must be between"),
        ([], "SAMPLES"),
    ],
)
def test_bad_command_lines(
    tmp_path: Path, real: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    text = write_text(tmp_path / "real.txt", real[:50])
    filled = [argument.format(real=text, tmp=tmp_path) for argument in arguments]
    assert run(*filled) == 1
    assert expected in one_sentence(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["real.txt"]


def test_what_real_text_does_not_have_is_left_out(real: list[str]) -> None:
    """Of a reference of one word a line there are no pairs of words."""
    result = figures.evaluate(real[:500], [line.split()[0] for line in real])
    assert {"distinct_2", "distinct_3", "js_2", "js_3", "repetition"} <= result.left_out.keys()
    assert {"distinct_1", "js_1", "unique"} <= {row.figure.key for row in result.rows}
    json.dumps(evaluate.as_json(result), allow_nan=False)


def test_held_out_lines_that_are_rarer_are_not_the_bar() -> None:
    """`simple` keeps its test lines out of training, so that common sentences are not among them."""
    simple, test = Grammar.load(DATA / "simple" / "grammar.json"), (DATA / "simple-test.txt").read_text().splitlines()
    alarms, rarer = 0, 0
    for seed in range(4):
        samples = simple.sample(2000, np.random.default_rng(100 + seed))
        alarms += len(worse(figures.evaluate(samples, test, grammar=simple, seed=seed)))
        rarer += len(worse(figures.evaluate(samples, test, seed=seed)))
    assert alarms <= 3 < rarer


def test_figures_do_not_depend_on_which_others_there_are(real: list[str], animals: Grammar) -> None:
    samples = real[:400]
    few = figures.evaluate(samples, real)
    more = figures.evaluate(samples, real, train=real[:5], scorer=teacher)
    for row in few.rows:
        assert more.row(row.figure.key) == row


def test_a_line_in_shape_is_not_enough(animals: Grammar) -> None:
    """A figure of slots needs as many lines of the language's shape as it says, whatever else there is."""
    rng = np.random.default_rng(0)
    real = animals.sample(600, rng)
    result = figures.evaluate(["hello there you"] * 299 + real[:1], real, grammar=animals)
    assert {"slot_kl", "mutual_information"} <= result.left_out.keys()


def test_white_space_around_a_line_is_no_novelty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, real = tmp_path / "train.txt", tmp_path / "real.txt"
    train.write_text("".join(f"one {i} two\n" for i in range(100)))
    real.write_text("".join(f"one {i} two\n" for i in range(100, 200)))
    copies = tmp_path / "copies.txt"
    copies.write_text("".join(f"  one {i} two\n" for i in range(60)))
    assert evaluate.main([str(copies), "--reference", str(real), "--train", str(train)]) == 0
    assert "novel 0.00 %" in capsys.readouterr().out


@pytest.mark.parametrize("change", [str.lower, lambda line: line.replace(".", " .")])
def test_another_spelling_of_a_known_language_is_said(change: Callable[[str], str], animals: Grammar) -> None:
    lines = animals.sample(200, np.random.default_rng(0))
    result = figures.evaluate([change(line) for line in lines], lines, grammar=animals)
    assert any(
        "no line is spelled as the language is" in warning or "case differ" in warning for warning in result.warnings
    )


def test_intervals_hold_nothing_impossible(animals: Grammar) -> None:
    lines = animals.sample(300, np.random.default_rng(0))
    result = figures.evaluate(lines[:1] * 150 + lines[:150], lines, grammar=animals)
    shares = [row for row in result.rows if row.figure.unit == "%"]
    assert all(0 <= row.samples.low <= row.samples.high <= 1 for row in shares)
