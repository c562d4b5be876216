"""Checkpoints: names, what is in the files, writing them whole, finding the latest, loading without running anything.

    model012345.pt          raw weights after step 12345
    ema_0.9999_012345.pt    their moving average, one file for each EMA rate
    opt012345.pt            what resuming needs besides; written last, so that its presence says the set is whole

A weights file is self-contained: weights, settings and tokenizer. The tied weight is stored once, as
`word_embedding.weight`.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from text_diffusion import original
from text_diffusion.config import ONCE, DiffusionConfig, ModelConfig
from text_diffusion.errors import UserError
from text_diffusion.files import project_root, write_atomically
from text_diffusion.flags import build
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.objectives import OBJECTIVES, Network
from text_diffusion.parallel import whole
from text_diffusion.remote import local
from text_diffusion.schedules import named_betas
from text_diffusion.tokenizer import Tokenizer

FORMAT = 1
TIED = "lm_head.weight"


def weights_path(folder: Path, step: int, ema_rate: float | None = None) -> Path:
    """The weights file of a step: raw, or averaged at a rate."""
    return folder / (f"model{step:06d}.pt" if ema_rate is None else f"ema_{ema_rate}_{step:06d}.pt")


def opt_path(folder: Path, step: int) -> Path:
    """The file that makes a checkpoint one to resume from."""
    return folder / f"opt{step:06d}.pt"


def resumable_steps(folder: Path) -> list[int]:
    """Steps with a whole checkpoint, latest first."""
    steps = [int(found[1]) for p in folder.glob("opt*.pt") if (found := re.fullmatch(r"opt(\d+)\.pt", p.name))]
    return sorted(steps, reverse=True)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on the CPU, put together if it is sharded, the tied weight once."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name != TIED}
    tensors = whole([tensor.detach() for tensor in state.values()])
    return {name: tensor.to("cpu", copy=True) for name, tensor in zip(state, tensors, strict=True)}


def write(path: Path, contents: dict[str, Any]) -> None:
    """Save atomically, with the format's version."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT} | contents, file))


def read(path: Path) -> dict[str, Any]:
    """The contents of a `.pt` file, which may hold tensors and plain values only.

    Raises:
        UserError: it is missing (the message lists those that are there), truncated, foreign or of a later format.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a checkpoint, found {_what_is_there(path)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are then refused in a sentence
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise UserError(f"{path}: expected a checkpoint that may be read, found no permission to") from None
    except Exception:  # on damaged and foreign files torch's reader raises errors of every kind
        raise UserError(
            f"{path}: expected a whole checkpoint, found a file that is truncated or of another kind; "
            f"take another one or train again"
        ) from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a checkpoint, found a saved {type(contents).__name__}")
    if contents.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: expected format {FORMAT}, found {contents['format']!r}: update the program")
    return contents


def check_bytes(path: Path) -> None:
    """Compare what a `.pt` file holds, a zip archive, with the checksums in it.

    Raises:
        UserError: they differ, though it may be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a whole checkpoint, found: {error}") from None
    if damaged:
        raise UserError(f"{path}: expected a whole checkpoint, found bytes that do not fit their checksum")


@dataclass(frozen=True)
class Weights:
    """What a weights file holds, ready to use."""

    model: Network
    diffusion: GaussianDiffusion
    tokenizer: Tokenizer
    sequence_len: int
    info: dict[str, Any]


def load_weights(path: Path, device: torch.device, tokenizer: str = "") -> Weights:
    """Build model, process and tokenizer from a weights file, ours or the original's.

    Args:
        path: the file.
        device: where the model goes.
        tokenizer: path of a vocabulary file; needed for the original's weights, otherwise it must be the file's own.

    Raises:
        UserError: see `read`; or the file holds no weights, or the tokenizer is not the one it was trained with.
    """
    contents = read(path)
    if zipfile.is_zipfile(path):  # other archives are the original's, or older programs'
        check_bytes(path)
    given = Tokenizer.from_file(local(tokenizer)) if tokenizer else None
    if original.is_original(contents):
        if given is None:
            raise UserError(f"{path}: weights of the original carry no vocabulary; give its file as --tokenizer FILE")
        try:
            contents = original.convert_file(contents, path, given.to_json())
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(f"{path}: expected the weights of the original, found a part missing ({error})") from None
    missing = {"state", "model", "diffusion", "sequence_len", "tokenizer"} - contents.keys()
    if missing:
        hint = "; sample from the model*.pt or ema_*.pt file beside it" if "optimizer" in contents else ""
        raise UserError(f"{path}: expected a weights file, found one without {', '.join(sorted(missing))}{hint}")
    own = Tokenizer.from_json(contents["tokenizer"], str(path))
    if given is not None and given.backend.get_vocab() != own.backend.get_vocab():
        raise UserError(f"{tokenizer}: expected the tokenizer that {path} was trained with, found another vocabulary")
    try:
        return _assemble(contents, own, device, path)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: expected a weights file, found one whose contents do not fit ({error})") from None


def _assemble(contents: dict[str, Any], tokenizer: Tokenizer, device: torch.device, path: Path) -> Weights:
    """Model and process from the contents of a weights file."""
    state, diffusion_config = contents["state"], build(DiffusionConfig, ONCE, contents["diffusion"])
    rows, length = state["word_embedding.weight"].shape[0], contents["sequence_len"]
    if tokenizer.vocab_size != rows:
        raise UserError(f"{path}: expected a tokenizer with {rows} tokens, found one with {tokenizer.vocab_size}")
    config = build(ModelConfig, ONCE, contents["model"])
    positions = length if config.denoiser == "modern" else len(state["position_embeddings.weight"])
    if not isinstance(length, int) or not 3 <= length <= positions:
        raise UserError(f"{path}: expected a sentence length between 3 and {positions}, found {length!r}")
    with torch.device("meta"):  # no time spent on random weights that are about to be replaced
        conditions = len(state["condition.weight"]) if config.condition != "none" else 0
        model = OBJECTIVES[config.objective].network(config, rows, positions, conditions)
    load_state(model, state, path)
    betas = named_betas(diffusion_config.noise_schedule, diffusion_config.diffusion_steps)
    diffusion = GaussianDiffusion(betas, device, time_scale=contents.get("time_scale"))
    info = {name: value for name, value in contents.items() if name not in ("state", "tokenizer")}
    return Weights(model.to(device).eval(), diffusion, tokenizer, length, info)


def load_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Put a stored state dict into a model, tie restored.

    Raises:
        UserError: names or shapes do not fit.
    """
    try:
        model.load_state_dict(state | {TIED: state["word_embedding.weight"]}, assign=_on_meta(model))
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{source}: the weights do not fit the model: {reason}") from None
    if isinstance(model, Network):
        model.lm_head.weight = model.word_embedding.weight


def _on_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


def _what_is_there(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    beside = sorted(p.name for p in folder.glob("*.pt") if not p.name.startswith("opt"))
    if beside:
        return f"only these in {folder}: {', '.join(beside)}"
    root, here = project_root(), Path.cwd()
    found = sorted(p for p in root.glob("ckpts/*/*.pt") if not p.name.startswith("opt"))
    others = [str(p.relative_to(here) if p.is_relative_to(here) else p) for p in found]
    return f"none there; there are {', '.join(others)}" if others else "none; `bash scripts/run_train.sh` makes some"
