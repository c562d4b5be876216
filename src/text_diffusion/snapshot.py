"""A checkpoint: first in memory, where training can no longer change it, then in files, as whole as on one process.

Under FSDP optimizer and averages are too large for one rank: each writes its shards into a folder beside the opt file
(torch.distributed.checkpoint, as safetensors), from which any number of ranks reads them, sharded or not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_diffusion import checkpoint
from text_diffusion.checkpoint import opt_path, resumable_steps, weights_path
from text_diffusion.errors import UserError
from text_diffusion.files import write_atomically

SHARDS = ".shards"
MARK = "snapshot.txt"  # among the shards: which snapshot they are of, as weights and opt files say themselves
NEEDED = {"run", "step", "weights", "optimizer", "settings", "fingerprint", "tokenizer", "meter"}  # in an opt file


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint consists of, on one rank.

    Args:
        run: the run's identifier; weights files that another run left are not overwritten.
        step: after which it was taken.
        weights: of each weights file its EMA rate (None: the raw weights) and contents; on rank 0.
        opt: contents of the opt file; on rank 0.
        shards: this rank's part of what is sharded, by name; empty if nothing is.
    """

    run: str
    step: int
    weights: list[tuple[float | None, dict[str, Any]]]
    opt: dict[str, Any]
    shards: dict[str, Tensor]

    def write(self, folder: Path) -> list[Path]:
        """Write the files, on rank 0, and return the weights files, the raw one first.

        The opt file comes last: it says that the set is whole, and names the others. One of the same step may be there,
        of a set that was damaged: until it is replaced it takes none of the new files for its own, by their mark.

        Raises:
            UserError: a file cannot be written; then no new one is left behind.
        """
        paths: list[Path] = []
        fresh: list[Path] = []  # nothing stood in their place
        try:
            for rate, contents in self.weights:
                path = _not_foreign(weights_path(folder, self.step, rate), self.run)
                is_fresh = not path.exists()
                checkpoint.write(path, contents)
                paths.append(path)
                fresh += [path] if is_fresh else []
            names = [path.name for path in paths]
            shards = shards_path(folder, self.step)
            sizes = {path.name: path.stat().st_size for path in paths}
            more: dict[str, Any] = {"weights": names[0], "files": names, "sizes": sizes}
            if self.shards:
                write_atomically(shards / MARK, lambda file: file.write(self.opt["snapshot"].encode()))
                more |= {"shards": shards.name, "shard_sizes": _sizes(shards)}
            checkpoint.write(opt_path(folder, self.step), self.opt | more)
        except UserError:
            for path in fresh:  # without its opt file a set is nobody's
                path.unlink()
            raise
        return paths


def frozen(value: Any) -> Any:
    """A copy of plain values and tensors, on the CPU, that nothing changes any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, list) else value


def find_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The contents of the newest opt file that is whole, with a line about each that is not; None without any.

    Raises:
        UserError: there are opt files and not one is whole.
    """
    problems = []
    for step in resumable_steps(folder):
        try:
            return whole(folder, step)
        except UserError as error:
            problems.append(str(error))
            print(f"warning: passed over: {error}", file=sys.stderr)
    if problems:
        raise UserError(f"{folder}: expected a whole checkpoint to go on from, found none: {problems[0]}")
    return None


def whole(folder: Path, step: int) -> dict[str, Any]:
    """The contents of the opt file of a step whose checkpoint is whole.

    Raises:
        UserError: a file is missing, truncated, damaged or foreign.
    """
    path = opt_path(folder, step)
    opt = checkpoint.read(path)
    checkpoint.check_bytes(path)
    if missing := NEEDED - opt.keys():
        raise UserError(f"{path}: expected an opt file, found one without {', '.join(sorted(missing))}")
    for name in opt.get("files", [opt["weights"]]):
        weights = checkpoint.read(folder / name)
        if weights.get("run", opt["run"]) != opt["run"]:
            continue  # those of another run are refused when they are loaded
        size, found = opt.get("sizes", {}).get(name), (folder / name).stat().st_size
        if size not in (None, found):
            raise UserError(f"{folder / name}: expected a checkpoint of {size} bytes, found {found}")
        checkpoint.check_bytes(folder / name)
        _check_mark(folder / name, weights.get("snapshot"), opt)
    if opt.get("shards"):
        _check_shards(folder / opt["shards"], opt["shard_sizes"])
        mark = folder / opt["shards"] / MARK
        _check_mark(mark.parent, mark.read_text() if mark.is_file() else None, opt)
    return opt


def _check_mark(path: Path, mark: str | None, opt: dict[str, Any]) -> None:
    """Refuse what was written when the run came to the step again, and was killed before the opt file was."""
    if mark != opt.get("snapshot"):  # older files have none
        raise UserError(f"{path}: expected what belongs to {opt_path(Path(), opt['step'])}, found another snapshot's")


def prune(folder: Path, run: str, keep_last: int, written: Collection[int] = ()) -> None:
    """Remove this run's checkpoints but for the newest whole ones; 0 keeps all. Files of other runs stay.

    Args:
        folder: the run's.
        run: its identifier.
        keep_last: how many stay. A damaged one does not count: it must not take the place of one to fall back on.
        written: steps that are known to be whole.
    """
    kept = 0
    for step in resumable_steps(folder) if keep_last else []:
        try:
            if kept < keep_last:
                kept += step in written or whole(folder, step)["run"] == run
                continue
            opt = checkpoint.read(opt_path(folder, step))
        except UserError:
            continue
        if opt.get("run") != run or "files" not in opt:
            continue
        opt_path(folder, step).unlink()  # first: a set that is only half there is none
        for name in opt["files"]:
            (folder / name).unlink(missing_ok=True)
        remove_shards(folder, step)


def check_safetensors() -> None:
    """Find out before the work whether shards can be written.

    Raises:
        UserError: the library is not there.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise UserError("--parallel fsdp needs a library that is not there: pip install safetensors")


def shards_path(folder: Path, step: int) -> Path:
    """The folder of a step's shards."""
    return opt_path(folder, step).with_suffix(SHARDS)


def remove_shards(folder: Path, step: int) -> None:
    """Remove a step's shards, if there are any."""
    shutil.rmtree(shards_path(folder, step), ignore_errors=True)


def remove_stray_shards(folder: Path) -> None:
    """Remove shards whose opt file was never written, as the run was killed before."""
    for path in folder.glob(f"opt*{SHARDS}"):
        if not path.with_suffix(".pt").is_file():
            shutil.rmtree(path, ignore_errors=True)


def write_shards(path: Path, shards: dict[str, Tensor], group: Any) -> None:
    """Write every rank's part; each of them calls this.

    Raises:
        UserError: a part cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(shards, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True), process_group=group)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error


def read_shards(path: Path, wanted: dict[str, Tensor]) -> None:
    """Fill tensors, sharded or not, from what any number of ranks has written.

    Raises:
        UserError: a part is missing or truncated.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        reader = HuggingFaceStorageReader(str(path))
        load(wanted, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    except Exception as error:  # safetensors and torch raise errors of every kind on damaged files
        raise UserError(
            f"{path}: expected whole shards of a checkpoint, found a part missing or truncated "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def _check_shards(folder: Path, sizes: dict[str, int]) -> None:
    found = _sizes(folder)
    for name, size in sizes.items():
        if found.get(name) != size:
            raise UserError(f"{folder / name}: expected a shard of {size} bytes, found {found.get(name, 'none')}")


def _not_foreign(path: Path, run: str) -> Path:
    """`path`, or a name beside it when another run's weights (the shipped ones, say) are there."""
    if not path.is_file():
        return path
    try:
        if checkpoint.read(path).get("run") == run:
            return path
        why = "belongs to another run"
    except UserError:
        if _is_named(path, run):  # by us: it was damaged since
            return path
        why = "cannot be read, nor is it known whose it is,"
    other = _not_foreign(path.with_name(f"{path.stem}.new.pt"), run)
    print(f"{path.name} {why} and stays; written to {other.name} instead", file=sys.stderr)
    return other


def _is_named(path: Path, run: str) -> bool:
    """Whether an opt file of the run names a file as one of its set."""
    for step in resumable_steps(path.parent):
        with contextlib.suppress(UserError):
            opt = checkpoint.read(opt_path(path.parent, step))
            if opt.get("run") == run and path.name in opt.get("files", []):
                return True
    return False
