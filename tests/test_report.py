"""The report of a run: whole, in progress, several beside each other, and bad input."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from toy import LINES, SIZES, flags, one_sentence, train_flags, write_text

from text_diffusion import figures, report, train
from text_diffusion.generation import load_diffusion
from text_diffusion.visible import visible
from text_diffusion.visual.charts import Chart, Series, svg, ticks
from text_diffusion.visual.folder import latest_weights, read_run
from text_diffusion.visual.recording import Frame, Word, record
from text_diffusion.visual.terminal import text_of

FEW = {"samples": 60, "steps": 4, "frames": 5, "show": 3}
EVIL = "<script>hacked=1</script>", "<img/src=x/onerror=hacked=1>", "\x1b[31mred\x07", "</script><b>", "&amp;"


@pytest.fixture(autouse=True)
def _fewer_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "HALVES", 4)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a complete run, with more held-out lines than it had."""
    folder = shutil.copytree(trained, tmp_path / "run")
    write_text(folder / "toy-test.txt", LINES)
    return folder


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose words are HTML and escape codes."""
    folder = tmp_path_factory.mktemp("evil")
    lines = [f"{a} {b} {c}" for a in EVIL for b in EVIL for c in ("one", "two", "three")]
    corpus = write_text(folder / "evil.txt", lines)
    assert train.main(train_flags(corpus, folder / "run", steps=4, save_interval=4, eval_interval=4)) == 0
    return folder / "run"


def made(*runs: Path, **options: Any) -> int:
    return report.main([*map(str, runs), *flags(**FEW | options)])


class Page(HTMLParser):
    """What a browser would make of a page: its headings, text, and whatever it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.data: list[str] = []
        self.open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open = tag
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "action") and value != "data:,"]

    def handle_data(self, data: str) -> None:
        if self.open == "h2" and data.strip():
            self.headings.append(data)
        if self.open not in ("script", "style"):
            self.data.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.data)


def read(path: Path) -> Page:
    html = path.read_text(encoding="utf-8")
    assert "http:" not in html
    assert "https:" not in html
    page = Page(html)
    assert page.loads == []
    return page


def frames_of(path: Path) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="[\w-]+">(.*?)</script>', path.read_text(encoding="utf-8"))
    return [json.loads(text) for text in found]


def lines_of(data: dict[str, Any], frame: int, view: str = "noisy") -> list[str]:
    """Sentences as the player puts them together."""
    texts = []
    for row in data["frames"][frame][view]:
        words = [data["words"][number] for number in row[::2]]
        texts.append("".join(" " * space + text for text, space in words).strip())
    return texts


# A whole run


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert made(run) == 0
    captured = capsys.readouterr()
    assert captured.out == f"written the report to {run / 'report.html'}\n"
    page = read(run / "report.html")
    assert page.headings == [
        "From noise to words",
        "Samples",
        "Evaluation",
        "Quality against steps",
        "Calibration",
        "Training",
        "Word embeddings",
        "Settings",
    ]
    for title in ("Loss, term by term", "Loss by noise level", "Learning rate", "Gradient norm", "Norms of the"):
        assert title in page.text
    for term in ("decoder_nll", "tT_loss", "quarter 4: most noise", "Self-BLEU", "step 6"):
        assert term in page.text
    assert "no figure of" in page.text or "worse than real text on" in page.text
    drawn = {path.name for path in (run / "report").iterdir()}
    assert {"loss.png", "noise.png", "lr.png", "grad_norm.png", "quality.png", "player.gif"} <= drawn
    assert all(path.stat().st_size > 1000 for path in (run / "report").iterdir())


def test_player_ends_in_the_samples(writer: Path, tmp_path: Path) -> None:
    """And begins in noise; frames are as many as asked for, confidences are percentages."""
    out = tmp_path / "page.html"
    assert made(writer, out=out) == 0
    (data,) = frames_of(out)
    model = load_diffusion(writer)
    assert len(data["frames"]) == 5
    sentences = model.sample(3, steps=5)
    assert lines_of(data, -1) == lines_of(data, -1, "guess") == sentences
    assert lines_of(data, 0) != sentences
    noise = [frame["noise"] for frame in data["frames"]]
    assert noise == sorted(noise, reverse=True)
    sure = [c for frame in data["frames"] for view in ("noisy", "guess") for row in frame[view] for c in row[1::2]]
    assert min(sure) >= 0
    assert max(sure) <= 100
    page = read(out)
    for sentence in model.sample(5, steps=4):
        assert sentence in page.text


@torch.no_grad()
def test_confidence_is_that_of_the_head(writer: Path) -> None:
    """Word by word, from the steps themselves."""
    model = load_diffusion(writer)
    frames = record(model, 2, 4, 7)
    for frame, step in zip(frames[:-1], model.denoising(0, 2, steps=4, seed=7), strict=False):
        p = model.model.get_logits(step.pred_xstart).softmax(dim=-1)
        for b, words in enumerate(frame.guess):
            assert frame.t == step.t
            for place, word in enumerate(words, 1):
                assert word.confidence == pytest.approx(float(p[b, place].max()), abs=1e-6)


# Half a run


def test_weights_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the shipped ones are."""
    (run / "metrics.jsonl").unlink()
    (run / "training_args.json").unlink()
    assert made(run) == 0
    page = read(run / "report.html")
    assert "there is no metrics.jsonl in this folder" in page.text
    assert "Training" not in page.headings
    assert "Evaluation" in page.headings  # the weights know where their text is
    assert "left out: training curves" in capsys.readouterr().err


def test_a_run_in_progress(run: Path) -> None:
    """No weights yet; the last row is being written, an earlier one is damaged."""
    for path in run.glob("*.pt"):
        path.unlink()
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], "{broken", "[1]", "[" * 100_000, *lines[1:], lines[-1][:20]]))
    assert made(run) == 0
    page = read(run / "report.html")
    assert page.headings == ["Training", "Settings", "Not here"]
    assert "3 lines of metrics.jsonl are not rows of numbers" in page.text
    assert "there are no weights in this folder yet" in page.text


@pytest.mark.parametrize("contents", ["", '{"step": 5, "lo', "\n\n", '{"step": 5, "loss": NaN}\n'])
def test_hardly_any_metrics(run: Path, contents: str) -> None:
    (run / "metrics.jsonl").write_text(contents)
    assert made(run) == 0
    page = read(run / "report.html")
    assert "Training" not in page.headings
    assert ("metrics.jsonl has no whole row yet" in page.text) == ("NaN" not in contents)


def test_settings_of_another_kind(run: Path) -> None:
    (run / "training_args.json").write_text('{"data": {"train_txt_path": 7, "dataset": []}}')
    assert made(run) == 0


def test_without_its_texts(run: Path) -> None:
    for path in run.glob("toy-*.txt"):
        path.unlink()
    assert made(run) == 0
    assert "the held-out text of the run was not found" in read(run / "report.html").text


def test_on_the_core_requirements(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an extra adds is left out by name; the page is there."""
    original = builtins.__import__

    def without_extras(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in ("matplotlib", "PIL", "rich", "wordllama"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_extras)
    assert made(run) == 0
    page = read(run / "report.html")
    for what in ("PNG plots", "GIF of the player"):
        assert what in page.text
    assert "matplotlib is not there, of the extra viz: pip install '.[viz]'" in page.text
    assert "Training" in page.headings
    assert not (run / "report").exists()
    assert "left out: PNG plots" in capsys.readouterr().err


def test_without_rich_there_is_no_playing(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert made(run, play=True) == 1
    assert "--play needs rich, of the extra viz" in one_sentence(capsys.readouterr().err)
    assert not (run / "report.html").exists()


def test_left_to_right(corpus: Path, tmp_path: Path) -> None:
    """A model without noise has samples and figures, and no player."""
    options = {name: value for name, value in SIZES.items() if name not in ("num_channels", "diffusion_steps")}
    options |= {"dataset": corpus, "checkpoint_path": tmp_path / "run", "objective": "autoregressive", "steps": 2}
    assert train.main(flags(**options)) == 0
    assert made(tmp_path / "run", checkpoint=tmp_path / "run" / "ema_0.9_000002.pt") == 0
    page = read(tmp_path / "run" / "report.html")
    assert "this model knows no noise" in page.text
    assert {"Samples", "Evaluation", "Training", "Word embeddings"} <= set(page.headings)
    assert "From noise to words" not in page.headings


def test_the_other_objective(corpus: Path, tmp_path: Path) -> None:
    """Its probabilities of words are its own: the player's last step is still what it samples."""
    options = {name: value for name, value in SIZES.items() if name != "diffusion_steps"}
    options |= {"dataset": corpus, "checkpoint_path": tmp_path / "run", "objective": "cross_entropy", "steps": 20}
    assert train.main(flags(**options)) == 0
    assert made(tmp_path / "run") == 0
    page = read(tmp_path / "run" / "report.html")
    assert {"From noise to words", "Calibration", "Training"} <= set(page.headings)
    (data,) = frames_of(tmp_path / "run" / "report.html")
    weights = latest_weights(tmp_path / "run")
    assert weights is not None
    assert lines_of(data, -1) == load_diffusion(weights).sample(3, steps=5)
    sure = [c for frame in data["frames"][:-1] for row in frame["guess"] for c in row[1::2]]
    assert min(sure) < 60  # after 20 steps of training it cannot be sure
    # Norms on a sphere differ by rounding only, which is not drawn; nor is a loss of 0 on a logarithmic axis.
    assert "All embeddings have the same norm" in page.text
    assert "Norms of the embeddings" not in page.text
    rows = [{"step": step, "cross_entropy_q1": 0.0, "cross_entropy_q2": 1.0 / step} for step in (1, 2, 3)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert made(tmp_path / "run") == 0
    page = read(tmp_path / "run" / "report.html")
    assert "Not drawn, being 0 throughout: cross_entropy, quarter 1: least noise." in page.text
    assert page.text.count("cross_entropy, quarter 1") == 1
    assert "cross_entropy, quarter 2" in page.text


def test_sure_words_are_brighter_in_the_terminal() -> None:
    words = [Word(text, True, confidence) for text, confidence in (("low", 0.1), ("mid", 0.7), ("high", 0.99))]
    console = Console(force_terminal=True, color_system="standard", file=io.StringIO(), width=80)
    console.print(text_of(Frame(t=9, noise=0.5, noisy=[words], guess=[words]), 1, 2))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2mstep 1 of 2" in shown
    assert "\x1b[2m low\x1b[0m mid\x1b[1m high\x1b[0m" in shown


@pytest.mark.parametrize(("low", "high"), [(1.01, 1.09), (2.2, 4.6), (0.0031, 0.0044)])
def test_a_logarithmic_axis_within_a_decade_has_ticks(low: float, high: float) -> None:
    found = ticks(low, high, log=True)
    assert len(found) >= 2
    assert all(low <= value <= high for value in found)


def test_numbers_of_steps_are_written_out() -> None:
    chart = Chart("a", "a", "step", "", [Series("all", [0, 2000], [1.0, 2.0])])
    assert ">2,000<" in svg(chart)
    assert "e+03" not in svg(chart)


def test_shares_end_at_one() -> None:
    chart = Chart("a", "a", "step", "", [Series("all", [1, 2, 3], [1.0, 1.0, 1.0])], unit="%")
    assert ">100 %<" in svg(chart)
    assert ">150 %<" not in svg(chart)


# Several runs


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    """Settings that differ, a column each; folders of the same name go by their paths."""
    other = shutil.copytree(run, tmp_path / "deeper" / "run")
    settings = json.loads((other / "training_args.json").read_text())
    settings["train"]["lr"] = 0.125
    (other / "training_args.json").write_text(json.dumps(settings))
    assert made(run, other) == 0
    page = read(run / "compare.html")
    assert "Settings that differ" in page.headings
    assert "0.125" in page.text
    assert "hidden_size" not in page.text
    assert page.text.count(str(other)) > 3
    assert len(frames_of(run / "compare.html")) == 2
    assert "Learning rate" in page.text
    assert (run / "compare" / "loss.png").is_file()


def test_texts_of_a_conditional_run(tmp_path: Path) -> None:
    """The sentences of its held-out lines, without what they are given."""
    text = write_text(tmp_path / "toy.tsv", [f"{line}\t{line.split()[1]}" for line in LINES])
    assert train.main(train_flags(text, tmp_path / "run", condition="labels", steps=2)) == 0
    run = read_run(tmp_path / "run")
    held_out = [line.split("\t")[0] for line in (tmp_path / "run/toy-test.tsv").read_text().splitlines()]
    assert run.sentences("test") == held_out
    text = write_text(tmp_path / "pairs.tsv", [f"{line.split()[1]}\t{line}" for line in LINES])
    assert train.main(train_flags(text, tmp_path / "of source", condition="source", steps=2)) == 0
    assert set(read_run(tmp_path / "of source").sentences("train") or ()) <= set(LINES)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{tmp}/none"], "none: expected the folder of a run, found nothing"),
        (["{tmp}"], "found neither metrics.jsonl nor weights"),
        ([], "RUN"),
        (["{tmp}/text.txt"], "text.txt: expected a whole checkpoint"),
        (["{run}", "{tmp}/none"], "none: expected the folder of a run"),
        (["{run}", "--out", "{tmp}"], "expected a file to write to, found a folder"),
        (["{run}/model000006.pt", "--out", "{run}/model000006.pt"], "expected a file of its own to write to"),
        (["gs://bucket/run"], "expected a run on this machine, found one in a store"),
        (["{run}", "--out", "az://account/box/page.html"], "expected a file on this machine to write to"),
        (["{run}", "--frames", "1"], "--frames must be between 2 and 400"),
        (["{run}", "--checkpoint", "{run}/model000006.pt"], "expected a teacher"),
    ],
)
def test_bad_input(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    write_text(tmp_path / "text.txt", ["no weights"])
    (tmp_path / "empty").mkdir()
    before = sorted(path for path in tmp_path.rglob("*"))
    places = {"{tmp}": str(tmp_path / "empty")}
    given = [places.get(argument, argument).format(tmp=tmp_path, run=run) for argument in arguments]
    assert report.main(given) == 1
    assert expected in one_sentence(capsys.readouterr().err)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_damaged_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ema_0.9_000006.pt").write_bytes(b"no")
    assert made(run) == 1
    assert "expected a whole checkpoint" in one_sentence(capsys.readouterr().err)
    assert not (run / "report.html").exists()


def test_html_and_escape_codes_are_text(evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the page no tag comes from the corpus; on the terminal no escape code does."""
    assert made(evil, out=tmp_path / "page.html", play=True) == 0
    captured = capsys.readouterr()
    assert "\x07" not in captured.out + captured.err
    assert "\x1b" not in captured.out + captured.err
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\x1b" not in html
    page = read(tmp_path / "page.html")
    assert "img" not in page.tags
    assert page.tags.count("script") == 2  # the player's data, and the page's own
    assert "hacked" in page.text
    assert "␛" in page.text
    (data,) = frames_of(tmp_path / "page.html")
    assert lines_of(data, -1) == [
        visible(line) for line in load_diffusion(latest_weights(evil) or "").sample(3, steps=5)
    ]
