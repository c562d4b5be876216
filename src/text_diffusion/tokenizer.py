"""Word-level and byte-level tokenizers on the `tokenizers` library: train, load, encode, decode.

Both are lossless on their own corpus without a detokenizer of ours: words keep the space before them (`ByteLevel`
pre-tokenizer and decoder). A space is put before the sentence, always, and taken off again, so that a word is the same
token at the start of a sentence as inside it.

    python -m text_diffusion.tokenizer train-word-level FILE     writes word-level-vocab.json beside FILE
    python -m text_diffusion.tokenizer train-byte-level FILE     writes byte-level-vocab.json beside FILE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from text_diffusion import errors
from text_diffusion.errors import UserError
from text_diffusion.files import read_lines, write_atomically
from text_diffusion.flags import Parser
from text_diffusion.remote import is_remote, local, output

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("word-level", "byte-level")
UNLIMITED = 2**31 - 1  # the trainer's own default would cut a vocabulary at 30,000 words
BYTE_LEVEL_VOCAB_SIZE = 8192


class Tokenizer:
    """Text to ids and back; sentences are [CLS] w_1 ... w_n [SEP], then [PAD] up to length L."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True  # "[PAD]" in a text is five characters, not the token
        self.backend.no_padding()
        self.backend.no_truncation()
        vocab = backend.get_vocab()
        missing = [token for token in (PAD, UNK, CLS, SEP) if token not in vocab]
        if missing:
            raise UserError(f"a tokenizer must know {PAD}, {UNK}, {CLS} and {SEP}, found one without {missing[0]}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (vocab[token] for token in (PAD, UNK, CLS, SEP))
        self.vocab_size = max(vocab.values()) + 1  # an embedding has a row for each id, also where ids have gaps
        try:
            backend.encode("\ue000", add_special_tokens=False)  # a letter for private use
        except Exception:  # the library raises a bare Exception
            raise UserError(f"a tokenizer must give unknown words as {UNK}, found one that refuses them") from None

    @staticmethod
    def from_json(text: str, source: str = "the tokenizer") -> Tokenizer:
        """Read a tokenizer from its JSON text.

        Raises:
            UserError: it is not one.
        """
        try:
            return Tokenizer(tokenizers.Tokenizer.from_str(text))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except Exception:  # the library raises a bare Exception
            raise UserError(f"{source}: expected the JSON of a `tokenizers` tokenizer, found something else") from None

    @staticmethod
    def from_file(path: Path) -> Tokenizer:
        """Read a tokenizer's JSON file.

        Raises:
            UserError: there is no such file, or it is not a tokenizer.
        """
        if not path.is_file():
            raise UserError(f"{path}: expected a tokenizer's JSON file, found none; `train-word-level FILE` makes one")
        return Tokenizer.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))

    def to_json(self) -> str:
        """The JSON text, as in the file."""
        return self.backend.to_str()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Ids of each sentence, [CLS] and [SEP] around it, of any length."""
        encoded = self.backend.encode_batch_fast(list(sentences), add_special_tokens=False)
        return [[self.cls_id, *encoding.ids, self.sep_id] for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence up to the first [SEP], without special tokens, on one line."""
        ids = list(ids)
        if self.sep_id in ids:
            ids = ids[: ids.index(self.sep_id)]
        return self.decode_all(ids)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Every word, also after [SEP]: what a sentence in the making looks like."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text.replace("\n", " ")  # nothing else ends a line, see `read_lines`

    def unknown_share(self, encoded: Iterable[Sequence[int]]) -> float:
        """Share of [UNK] among the tokens of encoded sentences, [CLS] and [SEP] left out."""
        total = unknown = 0
        for ids in encoded:
            total += len(ids) - 2
            unknown += sum(i == self.unk_id for i in ids)
        return unknown / max(total, 1)


def train_word_level(lines: Iterable[str], vocab_size: int = UNLIMITED, lowercase: bool = False) -> Tokenizer:
    """A token for each word, number and punctuation mark of the lines, the most frequent first."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token=UNK))
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    return _train(backend, trainer, lines, lowercase)


def train_byte_level(
    lines: Iterable[str], vocab_size: int = BYTE_LEVEL_VOCAB_SIZE, lowercase: bool = False
) -> Tokenizer:
    """Byte-pair encoding over bytes: nothing is unknown to it."""
    backend = tokenizers.Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    return _train(backend, trainer, lines, lowercase)


def _train(backend: tokenizers.Tokenizer, trainer: Any, lines: Iterable[str], lowercase: bool) -> Tokenizer:
    space_before = normalizers.Prepend(" ")
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), space_before]) if lowercase else space_before
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.train_from_iterator(lines, trainer)
    ids = [(token, backend.token_to_id(token)) for token in (CLS, SEP)]
    backend.post_processor = processors.TemplateProcessing(single=f"{CLS} $A {SEP}", special_tokens=ids)
    return Tokenizer(backend)


def train_kind(kind: str, lines: Iterable[str]) -> Tokenizer:
    """Train a tokenizer of one of the KINDS with its defaults."""
    return train_word_level(lines) if kind == "word-level" else train_byte_level(lines)


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer's JSON file, whole or not at all."""
    text = json.dumps(json.loads(tokenizer.to_json()), ensure_ascii=False, indent=1)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def command(argv: Sequence[str] | None) -> None:
    """Parse the command line, train a tokenizer, write it, report it."""
    parser = Parser(prog="custom_tokenizer.py", description="Train a tokenizer on a text file, one sentence a line.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="train-word-level|train-byte-level")
    for kind in KINDS:
        sub = kinds.add_parser(f"train-{kind}", help=f"writes {kind}-vocab.json beside FILE")
        sub.add_argument("file", metavar="FILE", help="text, one sentence a line")
        default = "all words" if kind == "word-level" else str(BYTE_LEVEL_VOCAB_SIZE)
        sub.add_argument("--vocab_size", type=int, help=f"largest number of tokens (default {default})")
        sub.add_argument("--lowercase", action="store_true", help="lower-case the text")
        sub.add_argument("--out", help="write here instead")
    args = parser.parse_args(argv)
    kind = args.kind.removeprefix("train-")
    smallest = len(SPECIAL_TOKENS) + (256 if kind == "byte-level" else 1)
    if args.vocab_size is not None and args.vocab_size < smallest:
        raise UserError(f"--vocab_size must be at least {smallest}, found {args.vocab_size}")

    if is_remote(args.file) and not args.out:
        raise UserError(f"{args.file}: expected --out FILE beside a text in a store, found none")
    lines = read_lines(local(args.file))
    path = output(args.out or str(Path(args.file).parent / f"{kind}-vocab.json"), args.file)
    options = {"lowercase": args.lowercase} | ({"vocab_size": args.vocab_size} if args.vocab_size else {})
    tokenizer = (train_word_level if kind == "word-level" else train_byte_level)(lines, **options)
    save(tokenizer, path)

    expected = [line.lower() for line in lines] if args.lowercase else lines
    decoded = [tokenizer.decode(ids) for ids in tokenizer.encode(lines)]
    kept = sum(a == b for a, b in zip(expected, decoded, strict=True))
    print(f"{tokenizer.vocab_size} tokens from {len(lines)} lines; {kept} of {len(lines)} lines decode to themselves")
    print(f"written the tokenizer to {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return errors.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
