"""A page about a run: what its model writes, how good that is, how it was trained; or several runs side by side.

python -m text_diffusion.report ckpts/simple               writes ckpts/simple/report.html, and pictures to report/
python -m text_diffusion.report RUN RUN ...                compares; writes compare.html into the first folder

RUN is the folder of a run, also of one in progress, or one of its weights files. With --play the sentences are played
in the terminal too. The pictures, and that, need the extra `viz`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from text_diffusion import errors
from text_diffusion.config import ReportConfig
from text_diffusion.errors import UserError
from text_diffusion.files import write_atomically
from text_diffusion.flags import Parser, add_options, build
from text_diffusion.launcher import check_alone
from text_diffusion.memory import keep_freed_memory
from text_diffusion.remote import is_remote, output
from text_diffusion.teacher import load_teacher
from text_diffusion.visual import pictures, plots, terminal
from text_diffusion.visual.findings import Findings, find
from text_diffusion.visual.folder import RunFolder, read_run
from text_diffusion.visual.page import page


def usual_path(runs: Sequence[RunFolder]) -> Path:
    """Where the page goes unless it is said."""
    return runs[0].path / ("report.html" if len(runs) == 1 else "compare.html")


def on_this_machine(path: str) -> Path:
    """A run's folder or weights file.

    Raises:
        UserError: it is in a store.
    """
    if is_remote(path):
        raise UserError(f"{path}: expected a run on this machine, found one in a store; copy its folder here")
    return Path(path)


def tell_apart(runs: Sequence[RunFolder]) -> None:
    """Runs whose folders have the same name go by their paths."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.weights or run.path)


def draw(findings: Sequence[Findings], folder: Path) -> None:
    """The charts as PNG and the sentences in the making as GIF; without their libraries, the reason."""
    charts = plots.training([one.run for one in findings]) + plots.quality(findings)
    charts += [chart for one in findings[:1] for chart in (*plots.calibration(one), *plots.norms(one))]
    wanted: list[tuple[str, Callable[[], None]]] = [("PNG plots", lambda: pictures.plot(charts, folder))]
    if findings[0].frames:
        wanted.append(("GIF of the player", lambda: pictures.animate(findings[0].frames, folder / "player.gif")))
    for what, write in wanted:
        try:
            write()
        except ImportError as error:
            findings[0].run.missing[what] = (
                f"{error.name} is not there, of the extra viz: pip install '.[viz]' in the repository"
            )


def command(argv: Sequence[str] | None) -> None:
    """Parse, read, ask the models, write."""
    parser = Parser(prog="text-diffusion report", description="Write a page about a run, or compare several.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or a weights file")
    add_options(parser, ReportConfig)
    given = vars(parser.parse_args(argv))
    config = build(ReportConfig, given)
    check_alone("report")
    runs = [read_run(on_this_machine(path)) for path in given["runs"]]
    path = output(config.out or str(usual_path(runs)), *given["runs"])
    if config.play:
        terminal.check()
    tell_apart(runs)
    keep_freed_memory()

    scorer = load_teacher(config.checkpoint) if config.checkpoint else None
    findings = [find(run, config, scorer, lambda text: print(text, file=sys.stderr)) for run in runs]
    draw(findings, path.with_suffix(""))
    for one in findings:
        for what, why in one.run.missing.items():
            print(f"left out: {what}: {why}", file=sys.stderr)
    html = page(findings).encode()
    write_atomically(path, lambda file: file.write(html))
    if config.play:
        for one in findings:
            terminal.play(one.frames)
    print(f"written the report to {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return errors.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
