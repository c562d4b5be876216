"""A model's folder by its name on the Hugging Face hub, downloaded once and found there from then on."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

from text_diffusion.bert_folder import CONFIG, TOKENIZERS, WEIGHTS, parts_of
from text_diffusion.errors import UserError


def model_folder(name: str) -> Path:
    """The folder of a model: a path, or a name on the Hugging Face hub.

    Raises:
        UserError: there is no such folder, and the hub did not give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise UserError(
            "--pretrained_model must be a folder, or a name on the Hugging Face hub such as "
            f"google-bert/bert-base-uncased, found {name!r}, which is neither"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{name} is no folder here, and the hub needs a library: pip install huggingface_hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    def downloaded(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    def cached(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    if (found := _collected(cached)) is not None:
        return found
    print(f"{name}: no folder here, so downloaded from the Hugging Face hub, once", file=sys.stderr)
    try:
        found = _collected(downloaded)
    except LocalEntryNotFoundError:
        why = "the Hugging Face hub cannot be reached, and it was not downloaded before"
    except RepositoryNotFoundError:
        why = "the Hugging Face hub has no such model, or shows it to some accounts only"
    except Exception as error:  # the library's own, its transport's, the system's
        why = f"the Hugging Face hub did not give it: {(str(error) or type(error).__name__).splitlines()[0]}"
    else:
        if found is not None:
            return found
        why = f"on the Hugging Face hub it has no {CONFIG} with {' or '.join(WEIGHTS)}"
    raise UserError(f"--pretrained_model {name}: found no folder of this name, and {why}; give a model's folder")


def _collected(get: Callable[[str], Path | None]) -> Path | None:
    """The folder that what is needed of a model's files is in, once `get` has seen to each; None: something is missing.

    The weights come last, so that where they are the rest is, too.
    """
    config = get(CONFIG)
    if config is None:
        return None
    get("tokenizer_config.json")
    if not any(get(name) for name in TOKENIZERS):
        return None
    for name in WEIGHTS:
        if get(name):
            return config.parent
        index = get(f"{name}.index.json")
        if index and all(get(part) for part in parts_of(index)):
            return config.parent
    return None
