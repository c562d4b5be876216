"""BERT-shaped models, small and random, saved as Hugging Face's library saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from toy import train_flags, write_text
from transformers import BertConfig, BertModel

from text_diffusion import bert_folder, train

H, LAYERS, HEADS, POSITIONS = 16, 2, 2, 24
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "##s", "##y", "e", "##g", "##gs", "co", "##ld"]
WORDS = ["the", "is", "red", "blue", "old", "new", "raw", "apple", "fig", "pear", "ripe", "sweet", "hot"]
VOCAB = PIECES + WORDS
WHOLE = {"init_pretrained": True, "hidden_size": None, "num_layers": None, "num_heads": None}
WORDS_TOO = {"pretrained_embeddings": True, "in_channel": None}


def save_bert(folder: Path, kind: Any = BertModel, seed: int = 5, **options: Any) -> Path:
    """A model whose every weight is random, with its tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * H}
    usual = {"vocab_size": len(VOCAB), "max_position_embeddings": POSITIONS}
    model = kind(BertConfig(**{**sizes, **usual, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_text(folder / "vocab.txt", VOCAB)
    bert_folder.word_pieces(folder / "vocab.txt").save(str(folder / "tokenizer.json"))
    return folder


def argv(corpus: Path, folder: Path, **options: Any) -> list[str]:
    """Flags of a toy run; None leaves one of the toy sizes out."""
    usual = train_flags(corpus, folder, **{"steps": 2} | options)
    return [part for pair in zip(usual[::2], usual[1::2], strict=True) if pair[1] != "None" for part in pair]


def go(corpus: Path, folder: Path, **options: Any) -> Path:
    assert train.main(argv(corpus, folder, **options)) == 0
    return folder
