"""Parts of the report: text made harmless, charts, pictures, the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from toy import LINES, write_text

from text_diffusion.generation import TextDiffusion, load
from text_diffusion.visible import visible
from text_diffusion.visual import terminal
from text_diffusion.visual.charts import Chart, Series, shown, svg, ticks
from text_diffusion.visual.folder import latest_weights, read_metrics, read_run, thinned
from text_diffusion.visual.pictures import LARGEST, animate
from text_diffusion.visual.plots import training
from text_diffusion.visual.recording import Frame, Word, plain, record

# Parts


def test_visible_keeps_what_is_harmless() -> None:
    assert visible("déjà 語 <b> 'x'") == "déjà 語 <b> 'x'"
    assert visible("\x1b]0;title\x07\x9b2J\x7f\u202e") == "␛]0;title␇�2J␡�"
    assert visible("a\x85b\u2028c\u2029d\re\x0b\x0c\x1c\x1d\x1e").splitlines() == ["a�b�c�d␍e␋␌␜␝␞"]


def test_reading_metrics(tmp_path: Path) -> None:
    path = write_text(tmp_path / "m", ['{"step": 2, "loss": 1}', "5", '{"step": 1, "loss": null, "lr": 0.5}'])
    assert read_metrics(path) == ([{"step": 1, "lr": 0.5}, {"step": 2, "loss": 1}], 1)


def test_latest_weights_are_the_averaged_ones_of_the_last_step(tmp_path: Path) -> None:
    for name in ("model000900.pt", "ema_0.9_000900.pt", "ema_0.9999_001000.pt", "model001000.pt", "opt002000.pt"):
        (tmp_path / name).touch()
    assert latest_weights(tmp_path) == tmp_path / "ema_0.9999_001000.pt"
    (tmp_path / "opt000900.pt").touch()  # so those were of a run here, and the others lay beside it
    assert latest_weights(tmp_path) == tmp_path / "ema_0.9_000900.pt"
    (tmp_path / "opt000900.pt").unlink()
    assert latest_weights(tmp_path, 950) == tmp_path / "ema_0.9_000900.pt"
    assert latest_weights(tmp_path, 800) is None


def test_a_run_that_has_begun_is_not_judged_by_weights_that_lay_there(tmp_path: Path) -> None:
    """As in ckpts/simple, until the first checkpoint of a run of one's own."""
    shipped = tmp_path / "ema_0.9999_025000.pt"
    shipped.touch()
    assert read_run(tmp_path).weights == shipped
    write_text(tmp_path / "metrics.jsonl", ['{"step": 50, "loss": 1.0}'])
    run = read_run(tmp_path)
    assert run.weights is None
    assert "everything that the model is asked for" in run.missing
    assert read_run(shipped).weights == shipped


@pytest.mark.parametrize(
    ("terms", "title", "lines"), [(("cross_entropy",), "Loss", 1), (("mse", "tT_loss"), "Loss, term by term", 3)]
)
def test_a_loss_of_one_term_is_one_line(terms: tuple[str, ...], title: str, lines: int, tmp_path: Path) -> None:
    names = ("loss", *terms)
    row = {"step": 50} | dict.fromkeys(names, 1.0) | {f"val_{name}": 1.0 for name in names}
    write_text(tmp_path / "metrics.jsonl", [json.dumps(row), json.dumps(row | {"step": 100})])
    loss, held_out = training([read_run(tmp_path)])[:2]
    assert (loss.title, len(loss.series), len(held_out.series)) == (title, lines, lines)


def test_thinned_keeps_means() -> None:
    x, y = thinned(range(1000), [2.0 * i for i in range(1000)], 100)
    assert len(x) == 100
    assert x[0] == 4.5
    assert y == [2 * value for value in x]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 12, False, [0, 5, 10]),
        (0.02, 0.6, True, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (1e-7, 1, True, [1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log) == pytest.approx(expected)


def test_svg_puts_points_where_they_belong() -> None:
    """Equal factors are equally far apart on a logarithmic axis; what it cannot show is left out."""
    chart = Chart("k", "t<", "x", "", [Series("a&b", [1, 2, 3, 4], [1, 10, 100, -5], points=True)], log_y=True)
    drawn = svg(chart)
    y = [float(value) for value in re.findall(r'cy="([\d.]+)"', drawn)]
    assert len(y) == 3
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert y[0] > y[1]
    assert "a&amp;b" in drawn
    assert "t&lt;" in drawn


def test_numbers_are_short() -> None:
    assert [shown(value) for value in (0, 0.25, 1234.5, 25_000, 2e-7)] == ["0", "0.25", "1,234", "25k", "2e-7"]
    assert shown(0.975, "%") == "97.5 %"


def test_gif_is_small_enough_whatever_it_shows(tmp_path: Path) -> None:
    """Sixty frames of words that change all the time would be some megabytes."""
    from PIL import Image

    def words(seed: int) -> list[Word]:
        return [Word(f"w{(seed * 7919 + i * 104729) % 99991}", True, (seed * i % 9) / 8) for i in range(60)]

    frames = [Frame(t, 0.5, [words(t * 31 + line) for line in range(8)], []) for t in range(60)]
    animate(frames, tmp_path / "player.gif")
    assert (tmp_path / "player.gif").stat().st_size <= LARGEST
    with Image.open(tmp_path / "player.gif") as image:
        assert getattr(image, "n_frames", 1) >= 4


def test_gif_of_a_word_without_end(tmp_path: Path) -> None:
    """A GIF is at most 65,535 pixels wide."""
    from PIL import Image

    frames = [Frame(t, 0.5, [[Word("x" * 10_000, True, 1.0), Word("y", True, 1.0)]], []) for t in range(2)]
    animate(frames, tmp_path / "player.gif")
    with Image.open(tmp_path / "player.gif") as image:
        assert image.width < 800


def test_terminal_shows_every_word(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(writer)
    assert isinstance(model, TextDiffusion)
    frames = record(model, 2, 4, 1)
    terminal.play(frames, pause=0)
    err = capsys.readouterr().err
    assert "step 4 of 4" in err
    for words in frames[-1].noisy:
        assert plain(words) in err
    assert LINES
