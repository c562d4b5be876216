"""Weights of BERT-shaped models under other names: the original's `.pt` files, and Hugging Face's encoder layers.

The original's files are plain state dicts; sizes follow from the tensors, the rest stands in `training_args.json`
beside them. An EMA file of the original holds the average in `word_embedding.weight` and stale raw weights in
`lm_head.weight`, so the former serves for both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_diffusion.config import ONCE, DiffusionConfig, ModelConfig
from text_diffusion.errors import UserError
from text_diffusion.flags import build

BERT_HEADS = 12  # BERT-base's, whatever the original's --num_heads said


def bert_layer(bert: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One layer of BERT, `prefix` such as "encoder.layer.0.", as the state dict of an EncoderLayer."""
    layer: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        layer[f"qkv.{kind}"] = torch.cat(
            [bert[f"{prefix}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
        )
        layer[f"attention_output.{kind}"] = bert[f"{prefix}attention.output.dense.{kind}"]
        layer[f"attention_norm.{kind}"] = bert[f"{prefix}attention.output.LayerNorm.{kind}"]
        layer[f"intermediate.{kind}"] = bert[f"{prefix}intermediate.dense.{kind}"]
        layer[f"output.{kind}"] = bert[f"{prefix}output.dense.{kind}"]
        layer[f"output_norm.{kind}"] = bert[f"{prefix}output.LayerNorm.{kind}"]
    return layer


def is_original(contents: object) -> bool:
    """Whether the contents of a `.pt` file are a state dict of the original."""
    return isinstance(contents, dict) and "input_transformers.layer.0.output.dense.weight" in contents


def check_own_settings(folder: Path, resumable: bool) -> None:
    """Refuse to train where another program's `training_args.json` lies, which its weights need.

    A damaged one is taken for our own where there is a run to go on with, which has its settings itself.

    Raises:
        UserError: it is not one of ours, which has its settings in groups.
    """
    path = folder / "training_args.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
        if resumable:
            return
    if not (isinstance(settings, dict) and isinstance(settings.get("model"), dict)):
        raise UserError(
            f"{path}: expected the settings of a run of this program, found those of another, which its weights need; "
            "give --checkpoint_path another folder, or move the file"
        )


def convert(state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A state dict of the original as our configuration and state dict."""
    layers = len({name.split(".")[2] for name in state if name.startswith("input_transformers.layer.")})
    config = ModelConfig(
        objective="diffusion_lm",
        in_channel=state["word_embedding.weight"].shape[1],
        hidden_size=state["position_embeddings.weight"].shape[1],
        num_layers=layers,
        num_heads=BERT_HEADS,
        neighbours=0,
        num_channels=state["time_embed.0.weight"].shape[1],
        activation="gelu",
        norm="post",
        self_condition=False,
    )
    names = (
        "time_embed.",
        "input_up_proj.",
        "output_down_proj.",
        "word_embedding.",
        "position_embeddings.",
        "LayerNorm.",
    )
    ours = {name: tensor for name, tensor in state.items() if name.startswith(names)}
    ours["lm_head.bias"] = state["lm_head.bias"]
    for n in range(layers):
        layer = bert_layer(state, f"input_transformers.layer.{n}.")
        ours |= {f"layers.{n}.{name}": tensor for name, tensor in layer.items()}
    return config, ours


def convert_file(contents: Mapping[str, Tensor], path: Path, tokenizer: str) -> dict[str, Any]:
    """The contents of an original's weights file as the contents of one of ours (`checkpoint`).

    Args:
        contents: the state dict.
        path: the file; `training_args.json` is read beside it.
        tokenizer: JSON text of the vocabulary it was trained with.

    Raises:
        UserError: `training_args.json` is missing or lacks what is needed, or the vocabulary has another size.
    """
    settings = path.with_name("training_args.json")
    try:
        args = json.loads(settings.read_text(encoding="utf-8"))
        its = {"diffusion_steps": int(args["diffusion_steps"]), "noise_schedule": str(args["noise_schedule"])}
        diffusion = build(DiffusionConfig, ONCE, its)
        length = int(args["sequence_len"])
    except OSError:
        raise UserError(f"{path}: weights of the original need their training_args.json beside them") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{settings}: expected the original's settings (diffusion_steps, noise_schedule, sequence_len), "
            f"found a problem with {error}"
        ) from None
    config, state = convert(contents)
    return {
        "format": 1,
        "state": state,
        "model": asdict(config),
        "diffusion": asdict(diffusion),
        "sequence_len": min(length, state["position_embeddings.weight"].shape[0]),
        "tokenizer": tokenizer,
        "time_scale": None if args.get("rescale_timesteps", True) else 1.0,
    }
