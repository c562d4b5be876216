"""Where a run's numbers go: a progress bar or status lines, metrics.jsonl, TensorBoard, wandb."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from text_diffusion.errors import UserError
from text_diffusion.files import write_atomically

Row = dict[str, float | int]


def check_extra(service: str) -> None:
    """Find out before the work whether the library of a service is there.

    Raises:
        UserError: it is not.
    """
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    try:
        if service in modules:
            importlib.import_module(modules[service])
    except ImportError:
        raise UserError(f"--track {service} needs a library that is not there: pip install {service}") from None


class Service(Protocol):
    """A logger outside: TensorBoard or wandb."""

    def log(self, row: Row) -> None:
        """Take in a row."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Scalars in the folder of the run."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def log(self, row: Row) -> None:
        """One point on each curve."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class Wandb:
    """Weights & Biases; where and how (also offline) is wandb's own business, by its environment variables."""

    def __init__(self, folder: Path, settings: dict[str, Any], id: str) -> None:
        import wandb

        self.run: Any = wandb.init(project="text-diffusion", dir=str(folder), config=settings, id=id, resume="allow")

    def log(self, row: Row) -> None:
        """One point on each curve."""
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Tracker:
    """Takes in rows of metrics and shows them; a bar on a terminal, a line a row elsewhere, both on standard error."""

    def __init__(self, folder: Path, service: str, settings: dict[str, Any], id: str, first: int, last: int) -> None:
        self.service: Service | None = None
        if service == "tensorboard":
            self.service = TensorBoard(folder, first)
        elif service == "wandb":
            self.service = Wandb(folder, settings, id)
        self.path = folder / "metrics.jsonl"
        if first == 0 and self.path.is_file() and self.path.stat().st_size:
            print(f"{self.path} is begun anew: the run before left no checkpoint to go on from", file=sys.stderr)
        trim(self.path, first)
        self.file = self.path.open("a", encoding="utf-8")
        self.unheard = False  # nobody reads standard error any more: `... 2>&1 | head`
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=last, initial=first, unit="step", dynamic_ncols=True, disable=not self.on_terminal, smoothing=0.05
        )

    def advance(self) -> None:
        """One more step is done."""
        self.bar.update()

    def log(self, row: Row) -> None:
        """Write a row everywhere; rounding is for display only."""
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.close()  # or closing would fail again, later
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self.service:
            self.service.log(row)

    def status(self, row: Row, last: int) -> None:
        """Show a training row: on the bar, or as a line."""
        names = ("loss", "mse", "tT_loss", "decoder_nll", "nll", "grad_norm", "lr")
        shown = {name: f"{row[name]:.3g}" for name in names if name in row}
        speed = row["sentences_per_s"]
        if self.on_terminal:
            self.bar.set_postfix(shown | {"sentences/s": f"{speed:.0f}"}, refresh=False)
        else:
            terms = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = (last - row["step"]) * row["batch_size"] / max(speed, 1e-9)
            self.say(f"step {row['step']}/{last}  {terms}  {speed:.0f} sentences/s  {clock(left)} left")

    def say(self, text: str) -> None:
        """A line above the bar."""
        try:
            self.bar.write(text, file=sys.stderr)
        except BrokenPipeError:
            self.unheard = True

    def close(self) -> None:
        """Finish bar, file and service."""
        self.bar.close()
        self.file.close()
        if self.service:
            self.service.close()


def trim(path: Path, step: int) -> None:
    """Drop the rows after `step`, which a run that goes on from there will write again; a line cut short goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", step + 1) <= step and step > 0:
            kept.append(line)
    text = "".join(line + "\n" for line in kept).encode()
    write_atomically(path, lambda file: file.write(text))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    return str(tqdm.format_interval(int(seconds)))
