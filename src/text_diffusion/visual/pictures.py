"""The charts as PNG by matplotlib, the sentences in the making as an animated GIF by Pillow (extra `viz`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from text_diffusion.files import write_atomically
from text_diffusion.visual.charts import COLOURS, Chart
from text_diffusion.visual.recording import Frame, Word

LARGEST = 500_000  # bytes of a GIF, so that a README can carry it
LINE_STYLES = ("-", "--", ":", "-.", (0, (4, 4)), (0, (1, 4)))
SIZE, LINE, MARGIN, BAR = 17, 34, 20, 3  # pixels: letters, a line of them, around, under a word
NARROWEST, WIDEST = 480, 760
LONGEST = 40  # letters of a word in a GIF
PAPER, INK, SOFT, ACCENT = (251, 250, 247), (27, 29, 33), (120, 126, 138), (11, 92, 173)


def plot(charts: Sequence[Chart], folder: Path) -> None:
    """A PNG file for each chart, by its key.

    Raises:
        ImportError: matplotlib is not there.
        UserError: the folder cannot be written to.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    for chart in charts:
        if chart.empty:
            continue
        figure = Figure(figsize=(6.4, 4), dpi=130, layout="constrained")
        axes: Any = figure.add_subplot()
        for number, series in enumerate(chart.series):
            points = chart.points(series)
            style = LINE_STYLES[number % len(LINE_STYLES)]
            x, y = [a for a, _ in points], [100 * b if chart.unit == "%" else b for _, b in points]
            marker = "o" if series.points or len(points) == 1 else ""
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=4, label=_plain(series.name))
        axes.set(title=_plain(chart.title), xlabel=_plain(chart.x_title), ylabel="%" if chart.unit == "%" else "")
        if chart.log_x:
            axes.set_xscale("log", base=2)
        if chart.log_y:
            axes.set_yscale("log")
        if len(chart.series) > 1:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        data = picture.getvalue()
        write_atomically(folder / f"{chart.key}.png", lambda file, data=data: file.write(data))  # type: ignore[misc]


def animate(frames: Sequence[Frame], path: Path) -> None:
    """The player as a GIF of at most LARGEST bytes: of fewer frames, and in the end fewer sentences, if need be.

    Of words that are longer than LONGEST only the beginning is drawn.

    Raises:
        ImportError: Pillow, or matplotlib, whose font is used, is not there.
        UserError: the file cannot be written.
    """
    lines = len(frames[-1].noisy)
    chosen = [replace(frame, noisy=[list(map(_shortened, words)) for words in frame.noisy]) for frame in frames]
    while True:
        data = _gif(chosen, lines)
        if len(data) <= LARGEST or (len(chosen) <= 4 and lines == 1):
            break
        if len(chosen) > 12:
            chosen = [*chosen[:-1][::2], chosen[-1]]
        elif lines > 1:
            lines -= max(1, lines // 4)
        else:
            chosen = [*chosen[:-1][::2], chosen[-1]]
    write_atomically(path, lambda file: file.write(data))


def _shortened(word: Word) -> Word:
    return word if len(word.text) <= LONGEST else replace(word, text=word.text[: LONGEST - 1] + "…")


def _gif(frames: Sequence[Frame], lines: int) -> bytes:
    import matplotlib as mpl
    from PIL import Image, ImageFont

    font = ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", SIZE)
    small = ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
    rows = max(len(_wrapped(words, font)) for words in frames[-1].noisy[:lines])
    placed = [row[-1] for frame in frames for words in frame.noisy[:lines] for row in _wrapped(words, font) if row]
    width = max([NARROWEST, *(round(2 * MARGIN + x + width) for _, x, width in placed)])
    size = (width, 2 * MARGIN + lines * rows * LINE + 24)
    images = [
        _draw(frame, i / (len(frames) - 1 or 1), lines, rows, size, font, small) for i, frame in enumerate(frames)
    ]
    palette = images[-1].quantize(32, dither=Image.Dither.NONE)
    small_images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [120] * (len(frames) - 1) + [3000]
    out = io.BytesIO()
    small_images[0].save(
        out, "GIF", save_all=True, append_images=small_images[1:], duration=times, loop=0, optimize=True
    )
    return out.getvalue()


def _wrapped(words: Sequence[Word], font: Any) -> list[list[tuple[Word, float, float]]]:
    """Words with their places and widths, row by row."""
    rows: list[list[tuple[Word, float, float]]] = [[]]
    x = 0.0
    for word in words:
        width = font.getlength(word.text)
        x += 9 if word.space and rows[-1] else 0
        if x + width > WIDEST - 2 * MARGIN and rows[-1]:
            rows.append([])
            x = 0.0
        rows[-1].append((word, x, width))
        x += width
    return rows


def _draw(frame: Frame, done: float, lines: int, rows: int, size: tuple[int, int], font: Any, small: Any) -> Any:
    """One picture: each word on its shade, over its bar; below, how far it is."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    for number, words in enumerate(frame.noisy[:lines]):
        for row, placed in enumerate(_wrapped(words, font)[:rows]):
            top = MARGIN + (number * rows + row) * LINE
            for word, x, width in placed:
                level = round(8 * word.confidence) / 8  # few shades make a small file
                shade = tuple(round(p + 0.18 * level * (a - p)) for p, a in zip(PAPER, ACCENT, strict=True))
                left = MARGIN + x
                draw.rectangle((left - 2, top, left + width + 1, top + LINE - 7), fill=shade)
                if level > 0:
                    bar = (left - 2, top + LINE - 7 - BAR, left - 2 + (width + 3) * level, top + LINE - 7)
                    draw.rectangle(bar, fill=ACCENT)
            for word, x, _ in placed:  # over all shades, as those of neighbours touch
                draw.text((MARGIN + x, top + 2), word.text, font=font, fill=INK)
    bottom = size[1] - 26
    draw.text((MARGIN, bottom), f"t = {frame.t}   {100 * frame.noise:.0f} % noise", font=small, fill=SOFT)
    draw.rectangle((MARGIN + 180, bottom + 6, size[0] - MARGIN, bottom + 9), fill=(226, 223, 216))
    draw.rectangle(
        (MARGIN + 180, bottom + 6, MARGIN + 180 + done * (size[0] - 2 * MARGIN - 180), bottom + 9), fill=ACCENT
    )
    return image


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formulas."""
    return text.replace("$", r"\$")
