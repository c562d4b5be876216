"""A corpus to tensors of ids: sentences of one length, and what they are given."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from text_diffusion.condition import NONE
from text_diffusion.config import DataConfig
from text_diffusion.corpus import Corpus
from text_diffusion.data import LONGEST_CHOSEN, choose_length, fit
from text_diffusion.errors import UserError
from text_diffusion.files import where
from text_diffusion.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A text as ids, held-out sentences if there are any, and what each is given, with --condition."""

    config: DataConfig  # with the lengths that were chosen
    train: Tensor  # (N, L)
    held_out: Tensor | None
    given: Tensor | None = None  # (N,) or (N, S)
    held_out_given: Tensor | None = None

    def to(self, device: torch.device) -> Encoded:
        """The same there."""
        tables = (self.train, self.held_out, self.given, self.held_out_given)
        train, *others = (None if table is None else table.to(device) for table in tables)
        assert train is not None
        return Encoded(self.config, train, *others)


def encode(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> Encoded:
    """Sentences, and what they are given, to ids; lengths that the settings leave open are chosen here.

    Raises:
        UserError: a sentence or a source is too long.
    """
    config, train, held_out = _sentences(config, corpus, tokenizer)
    if corpus.condition == "none":
        return Encoded(config, train, held_out)
    config, given, held_out_given = _given(config, corpus, tokenizer)
    return Encoded(config, train, held_out, given, None if held_out is None else held_out_given)


def _sentences(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> tuple[DataConfig, Tensor, Tensor | None]:
    """Sentences to ids of one length, which is chosen here if the settings leave it open; reports unknown words."""
    train, held_out = tokenizer.encode(corpus.train), tokenizer.encode(corpus.held_out)
    length = config.sequence_len or choose_length(train + held_out)
    print(
        f"{corpus.name}: {len(train)} training and {len(held_out)} held-out sentences of up to {length} tokens, "
        f"{tokenizer.vocab_size} in the vocabulary; unknown words: {tokenizer.unknown_share(train):.2%} in training, "
        f"{tokenizer.unknown_share(held_out):.2%} held out",
        file=sys.stderr,
    )
    if tokenizer.unknown_share(train) > 0.01:
        print(
            "warning: the tokenizer does not know the training text; was it trained on another? "
            "remove its file, and it is trained again",
            file=sys.stderr,
        )

    def table(encoded: list[list[int]], lines: list[str], source: Path) -> Tensor:  # lines as in the file
        return fit(encoded, length, tokenizer, config.long_lines, str(source), lambda i: where(source, lines[i]))

    if config.long_lines == "drop" and held_out and min(map(len, held_out)) > length:
        print(f"warning: every held-out sentence is longer than {length} tokens: no validation", file=sys.stderr)
        held_out = []
    ids = table(train, corpus.train_lines, corpus.source)
    held = table(held_out, corpus.held_out_lines, corpus.held_out_source) if held_out else None
    return replace(config, sequence_len=length), ids, held


def _given(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> tuple[DataConfig, Tensor, Tensor]:
    """What sentences are given: numbers of labels (N,), or ids of sources (N, S), S chosen if need be.

    Raises:
        UserError: a source is longer than S.
    """
    parts = [
        (corpus.train, corpus.train_given, corpus.train_lines, corpus.source),
        (corpus.held_out, corpus.held_out_given, corpus.held_out_lines, corpus.held_out_source),
    ]
    if corpus.condition == "source" and not config.source_len:
        longest = max(map(len, tokenizer.encode(corpus.train_given + corpus.held_out_given)))
        config = replace(config, source_len=min(longest, LONGEST_CHOSEN))
    number_of = {label: number for number, label in enumerate(corpus.labels)} | {"": NONE}
    tables = []
    for sentences, given, lines, source in parts:
        kept = list(range(len(sentences)))
        if config.long_lines == "drop":
            kept = [i for i, ids in enumerate(tokenizer.encode(sentences)) if len(ids) <= config.sequence_len]
        if corpus.condition == "labels":
            tables.append(torch.tensor([number_of[given[i]] for i in kept]))
            continue
        encoded = tokenizer.encode(given)
        for i in kept:
            if len(encoded[i]) > config.source_len:
                raise UserError(
                    f"{source}: expected sources of at most {config.source_len} tokens ([CLS] and [SEP] included), "
                    f"found {len(encoded[i])} {where(source, lines[i])}; shorten it, or take "
                    f"--source_len {max(map(len, encoded))}"
                )
        tables.append(encode_sources([given[i] for i in kept], config.source_len, tokenizer, str(source)))
    what = f"{len(corpus.labels)} labels" if corpus.labels else f"sources of up to {config.source_len} tokens"
    print(f"{corpus.name}: {what}", file=sys.stderr)
    return config, tables[0], tables[1]


def encode_sources(sources: list[str], length: int, tokenizer: Tokenizer, where: str) -> Tensor:
    """Ids (N, S) of sources, padded.

    Raises:
        UserError: one is longer, naming its line.
    """
    encoded = tokenizer.encode(sources)
    for number, ids in enumerate(encoded, 1):
        if len(ids) > length:
            raise UserError(
                f"{where}: expected sources of at most {length} tokens ([CLS] and [SEP] included), which is what the "
                f"model was trained with, found {len(ids)} in line {number}; shorten it"
            )
    return fit(encoded, length, tokenizer, "error", where)
