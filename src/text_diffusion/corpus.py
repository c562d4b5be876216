"""Which text a run learns from: a dataset by name, or any text file, split into training and held-out lines.

With a condition (`pairs`) a line has two fields: what the sentence is given is kept beside it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from text_diffusion import tokenizer as tokenizers
from text_diffusion.config import DataConfig
from text_diffusion.errors import UserError
from text_diffusion.files import project_root, read_lines, write_atomically
from text_diffusion.pairs import LABELS, SOURCE, Pair, labels_of, read_pairs
from text_diffusion.randomness import Stream, mix
from text_diffusion.remote import local
from text_diffusion.tokenizer import KINDS, Tokenizer

HELD_OUT_SHARE = 0.05
HELD_OUT_LINES = 500  # at most


@dataclass(frozen=True)
class Corpus:
    """Training and held-out sentences, where they came from, and where a tokenizer for them belongs.

    With a condition, each sentence's label ("" where none is known) or source is in `train_given`, `held_out_given`.
    """

    name: str
    train: list[str]
    held_out: list[str]
    source: Path
    held_out_source: Path
    vocab_folder: Path
    was_split: bool
    own_file: bool
    condition: str = "none"
    train_given: list[str] = field(default_factory=list)
    held_out_given: list[str] = field(default_factory=list)

    @property
    def train_lines(self) -> list[str]:
        """The training part as lines of a file."""
        return _lines(self.train, self.train_given, self.condition)

    @property
    def held_out_lines(self) -> list[str]:
        """The held-out part as lines of a file."""
        return _lines(self.held_out, self.held_out_given, self.condition)

    @property
    def text(self) -> list[str]:
        """What a tokenizer learns from."""
        return self.train + self.train_given if self.condition == "source" else self.train

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, sorted; none without a condition on them."""
        return tuple(sorted({*self.train_given, ""} - {""})) if self.condition == "labels" else ()

    @property
    def fingerprint(self) -> str:
        """Changes when the training lines or their order change."""
        return hashlib.sha256("\n".join(self.train_lines).encode()).hexdigest()[:16]

    def save_parts(self, folder: Path) -> None:
        """Write the two parts of a text that was split here, for whoever wants to see or use them."""
        ending = "txt" if self.condition == "none" else "tsv"
        for part, lines in (("train", self.train_lines), ("test", self.held_out_lines)):
            text = "".join(line + "\n" for line in lines).encode()
            path = folder / f"{self.name}-{part}.{ending}"
            if not path.is_file() or path.read_bytes() != text:
                write_atomically(path, lambda file, text=text: file.write(text))  # type: ignore[misc]


def dataset_name(config: DataConfig) -> str:
    """The name of a dataset, also of one that is given as a file: its name without the ending."""
    return Path(config.dataset).stem if _is_file(config.dataset) else config.dataset


def load(config: DataConfig, run_folder: Path, condition: str = "none") -> Corpus:
    """Find and read the lines of a dataset; a text without a held-out part is split. Writes nothing.

    Raises:
        UserError: there is no such dataset, or a file cannot be read.
    """
    data, name = project_root() / "data", dataset_name(config)
    train_path, test_path = data / f"{name}-train.txt", data / f"{name}-test.txt"
    own_file = bool(config.train_txt_path) or _is_file(config.dataset)
    if condition == "labels" and not own_file:
        return _labeled_dataset(config, name, data)
    if own_file:
        train_path = local(config.train_txt_path or config.dataset)
        if not config.train_txt_path and not train_path.exists():
            raise UserError(_unknown_dataset(config.dataset, data, ", which is no file"))
    elif not train_path.is_file():
        raise UserError(_unknown_dataset(name, data))
    if config.val_txt_path:
        test_path = local(config.val_txt_path)

    was_split = not config.val_txt_path and (own_file or not test_path.is_file())
    vocab_folder = run_folder if own_file else data / name
    source = train_path if was_split else test_path
    corpus = Corpus(name, [], [], train_path, source, vocab_folder, was_split, own_file)
    if condition == "source" or (condition == "labels" and own_file):
        return _of_pairs(corpus, *_pairs(train_path, None if was_split else test_path, condition), condition)
    lines = read_lines(train_path)
    if was_split:
        lines, held_out_lines = split(lines)
        counts = f"{len(lines)} lines to train on, {len(held_out_lines)} different ones held out"
        print(f"{train_path}: {counts}", file=sys.stderr)
    else:
        held_out_lines = read_lines(test_path)
        _warn_of_leakage(lines, held_out_lines)
    return replace(corpus, train=lines, held_out=held_out_lines)


def _labeled_dataset(config: DataConfig, name: str, data: Path) -> Corpus:
    """data/NAME/NAME_labeled.tsv, split; and the lines of the training text that are not in it, without a label.

    Raises:
        UserError: there is no such file.
    """
    path, rest = data / name / f"{name}_labeled.tsv", data / f"{name}-train.txt"
    if not path.is_file():
        if not rest.is_file():
            raise UserError(_unknown_dataset(name, data))
        raise UserError(f"{path}: --condition labels expects lines `sentence TAB label`, found no file")
    held_out_path = local(config.val_txt_path) if config.val_txt_path else None
    train, held_out = _pairs(path, held_out_path, "labels")
    known = {_same(sentence) for sentence, _ in train + held_out}
    more = [(line, "") for line in read_lines(rest) if _same(line) not in known] if rest.is_file() else []
    print(f"{rest}: {len(more)} more lines to train on, which have no label", file=sys.stderr)
    corpus = Corpus(name, [], [], path, held_out_path or path, data / name, held_out_path is None, own_file=False)
    return _of_pairs(corpus, train + more, held_out, "labels")


def _pairs(path: Path, held_out_path: Path | None, condition: str) -> tuple[list[Pair], list[Pair]]:
    """A text of two columns; without a held-out file it is split, so that no first field is on both sides."""
    columns = SOURCE if condition == "source" else LABELS
    rows = read_pairs(path, columns)
    first = [field for field, _ in rows]
    if held_out_path is None:
        kept = set(split(first)[0])
        train, held_out = [row for row in rows if row[0] in kept], [row for row in rows if row[0] not in kept]
        print(f"{path}: {len(train)} lines to train on, {len(held_out)} held out", file=sys.stderr)
    else:
        train, held_out = rows, read_pairs(held_out_path, columns)
        _warn_of_leakage(first, [field for field, _ in held_out])
    if condition == "labels":
        known = labels_of(train, path)
        if foreign := sorted({label for _, label in held_out} - {*known}):
            where, label = held_out_path or path, foreign[0]
            raise UserError(f"{where}: expected several sentences of each label, found too few of {label!r}")
    return train, held_out


def _of_pairs(corpus: Corpus, train: list[Pair], held_out: list[Pair], condition: str) -> Corpus:
    """The corpus with sentences from rows of two columns, and what they are given from the other column."""
    given, said = (0, 1) if condition == "source" else (1, 0)
    return replace(
        corpus,
        train=[row[said] for row in train],
        held_out=[row[said] for row in held_out],
        condition=condition,
        train_given=[row[given] for row in train],
        held_out_given=[row[given] for row in held_out],
    )


def split(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out lines: 5 % of the distinct lines, at most 500, none of which is in both parts.

    Lines that differ only in case or spacing count as the same. With a single distinct line nothing is held out.
    """
    distinct = {_same(line): line for line in lines}
    count = min(HELD_OUT_LINES, int(np.ceil(HELD_OUT_SHARE * len(distinct))), len(distinct) - 1)
    order = np.random.default_rng(mix(0, Stream.SPLIT)).permutation(len(distinct))
    keys = list(distinct)
    chosen = {keys[i] for i in order[:count]}
    return [line for line in lines if _same(line) not in chosen], [distinct[key] for key in keys if key in chosen]


def find_tokenizer(config: DataConfig, corpus: Corpus) -> tuple[Tokenizer, Path | None]:
    """The tokenizer of a dataset; where it is missing, one trained from the training text, and where to save it.

    Raises:
        UserError: the file is not a tokenizer.
    """
    if config.tokenizer not in KINDS:
        return Tokenizer.from_file(local(config.tokenizer)), None
    name = f"{config.tokenizer}-vocab.json"
    path = corpus.vocab_folder / name
    if corpus.own_file:  # in the run's folder one can only be left over from a run that died
        beside = corpus.source.with_name(name)
        if beside.is_file():  # custom_tokenizer.py put it there
            print(
                f"{beside}: used, as it lies beside the text; it may know words that only held-out lines have "
                "(without it, one is trained from the training lines alone)",
                file=sys.stderr,
            )
            return Tokenizer.from_file(beside), None
    elif path.is_file():
        return Tokenizer.from_file(path), None
    return tokenizers.train_kind(config.tokenizer, corpus.text), path


def check_same_tokenizer(given: str, kept: str, started_with: str) -> None:
    """Refuse a tokenizer's file that is not the tokenizer a run was started with, wherever the file lies.

    Args:
        given: on the command line: the path of a file, or one of KINDS, which need no look (see `FIXED`).
        kept: the JSON text that the run keeps.
        started_with: what was given then; the file itself may have gone since.

    Raises:
        UserError: it is another, or no tokenizer.
    """
    if given in KINDS or (given == started_with and not local(given).is_file()):
        return
    if Tokenizer.from_file(local(given)).to_json() != Tokenizer.from_json(kept).to_json():
        raise UserError(
            f"{given}: expected the tokenizer that the run was started with (--tokenizer {started_with}), found "
            "another; leave --tokenizer out, as a run keeps its own, or give --checkpoint_path another folder"
        )


def _is_file(dataset: str) -> bool:
    """What has a slash is a path; otherwise a name under data/ wins over a file in the working directory."""
    known = (project_root() / "data" / f"{dataset}-train.txt").is_file()
    return "/" in dataset or (not known and (Path(dataset).suffix != "" or Path(dataset).is_file()))


def _unknown_dataset(name: str, data: Path, why: str = "") -> str:
    known = sorted(path.name.removesuffix("-train.txt") for path in data.glob("*-train.txt"))
    names = ", ".join(known) or "(none: `simple` and the others come with the repository)"
    return f"DATASET must be the path of a text file or one of {names} in {data}, found {name!r}{why}"


def _lines(sentences: list[str], given: list[str], condition: str) -> list[str]:
    if condition == "none":
        return sentences
    rows = zip(given, sentences, strict=True) if condition == "source" else zip(sentences, given, strict=True)
    return ["\t".join(row).rstrip("\t") for row in rows]


def _same(line: str) -> str:
    return " ".join(line.split()).casefold()


def _warn_of_leakage(train: Sequence[str], held_out: Sequence[str]) -> None:
    seen = {_same(line) for line in train}
    copies = sum(_same(line) in seen for line in held_out)
    if copies:
        print(f"warning: {copies} of {len(held_out)} held-out lines are also in the training text", file=sys.stderr)
