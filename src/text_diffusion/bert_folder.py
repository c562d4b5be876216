"""Reading a BERT from a folder as Hugging Face's `transformers` writes it: its settings, its weights, its tokenizer.

`config.json`, `model.safetensors` (or `pytorch_model.bin`, of which tensors alone are read; either may be in several
parts, with an index), `tokenizer.json` (or `vocab.txt`). Nothing in them is executed, and `transformers` is not needed.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from text_diffusion import checkpoint
from text_diffusion.errors import UserError
from text_diffusion.modeling import LAYER_NORM_EPS
from text_diffusion.tokenizer import SPECIAL_TOKENS, UNK, Tokenizer

CONFIG, WEIGHTS, TOKENIZERS = "config.json", ("model.safetensors", "pytorch_model.bin"), ("tokenizer.json", "vocab.txt")
BERT_BASE: dict[str, Any] = {  # what a config.json leaves out is as in BERT-base
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "max_position_embeddings": 512, "vocab_size": 30522,
    "layer_norm_eps": LAYER_NORM_EPS, "position_embedding_type": "absolute", "is_decoder": False,
}  # fmt: skip
ROUNDING = 128  # a table of embeddings may have fewer than so many rows more than there are tokens


def read_config(folder: Path) -> dict[str, Any]:
    """Settings of the model in a folder, what is left out filled in.

    Raises:
        UserError: it is none of BERT's shape, or a setting makes no sense.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: expected the folder of a BERT-shaped model, found no {CONFIG} in it")
    config = _json(path)
    if (kind := config.get("model_type")) != "bert":
        raise UserError(f"{path}: expected model_type 'bert', found {kind!r}; take a BERT-shaped model")
    config = BERT_BASE | config
    for name, usual in BERT_BASE.items():
        value = config[name]
        if not isinstance(value, (int, float) if isinstance(usual, float) else type(usual)):
            raise UserError(f"{path}: expected {name} such as {usual!r}, found {value!r}")
        if isinstance(usual, int) and not isinstance(usual, bool) and value < 1:
            raise UserError(f"{path}: expected {name} of at least 1, found {value}")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, float32, by BERT's names of today.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    found: dict[str, Any] = {}
    for path in _weight_files(folder):
        found |= _read_safetensors(path) if path.suffix == ".safetensors" else checkpoint.read(path)
    renamed = {}
    for name, tensor in found.items():
        if isinstance(tensor, Tensor):
            name = re.sub("gamma$", "weight", re.sub("beta$", "bias", name.removeprefix("bert.")))  # as in 2018
            renamed[name] = tensor.float()
    return renamed


def _weight_files(folder: Path) -> list[Path]:
    """The file with the weights, or the several that an index names."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / part for part in parts_of(index)]
    raise UserError(f"{folder}: expected the weights of a model, found neither {' nor '.join(WEIGHTS)}")


def parts_of(index: Path) -> list[str]:
    """The names of the files that an index lists, in its own folder whatever it says."""
    names = _json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: expected an index of weights, found no weight_map in it")
    return sorted({Path(str(name)).name for name in names.values()})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if importlib.util.find_spec("safetensors") is None:
        raise UserError(f"{path} needs a library that is not there: pip install safetensors")
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # the library's own kind, or the system's
        raise UserError(f"{path}: expected a whole safetensors file, found: {error}") from None
    return tensors


def read_tokenizer(folder: Path, rows: int) -> Tokenizer:
    """The tokenizer in a folder, of a model with so many embeddings.

    Raises:
        UserError: there is none, or it cannot be that of a model with so many embeddings.
    """
    path = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: expected a tokenizer, found neither {' nor '.join(TOKENIZERS)}")
    if path.suffix == ".json":
        tokenizer = Tokenizer.from_file(path)
    else:
        tokenizer = Tokenizer.from_json(word_pieces(path).to_str(), str(path))
    if not tokenizer.vocab_size <= rows < tokenizer.vocab_size + ROUNDING:
        raise UserError(f"{path}: expected {rows} tokens, one for each embedding, found {tokenizer.vocab_size}")
    return tokenizer


def word_pieces(path: Path) -> tokenizers.Tokenizer:
    """BERT's tokenizer of a list of tokens, one a line."""
    settings = path.with_name("tokenizer_config.json")
    options = _json(settings) if settings.is_file() else {}
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(lines)}, unk_token=UNK))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=bool(options.get("do_lower_case", True)),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=bool(options.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([token for token in SPECIAL_TOKENS if token in lines])
    return backend


def _json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        contents = None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a JSON object, found something else")
    return contents
