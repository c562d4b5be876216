"""From sentences to batches, and the split without leakage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from toy import LINES, SIZES, flags, one_sentence, write_text

from text_diffusion import corpus as corpora
from text_diffusion import train as training
from text_diffusion.data import LONGEST_CHOSEN, Batches, choose_length, fit
from text_diffusion.errors import UserError
from text_diffusion.tokenizer import Tokenizer, train_word_level

TINY = SIZES | {"steps": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_word_level(LINES)


# Sentences to a table


def test_fit_pads_with_pad(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(["The red apple.", "The", "The red apple is."])
    table = fit(encoded, 7, tokenizer, "error", "text")
    assert table.dtype == torch.int64
    assert table.shape == (3, 7)
    for row, ids in zip(table.tolist(), encoded, strict=True):
        assert row == ids + [tokenizer.pad_id] * (7 - len(ids))
    assert [tokenizer.decode(row) for row in table.tolist()] == ["The red apple.", "The", "The red apple is."]


def test_pad_need_not_be_the_first_token() -> None:
    """As in the original's vocabularies, where 0 is [UNK]."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "fig"]
    backend = Backend(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = Tokenizer(backend)
    table = fit(tokenizer.encode(["the fig", "the red fig"]), 6, tokenizer, "error", "text")
    assert table.tolist() == [[1, 5, 6, 2, 3, 3], [1, 5, 0, 6, 2, 3]]


def test_truncation_keeps_the_end_of_the_sentence(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    encoded = tokenizer.encode(["The red apple is ripe.", "The", "The old egg is hot."])
    table = fit(encoded, 4, tokenizer, "truncate", "text")
    assert table[:, 3].tolist() == [tokenizer.sep_id, tokenizer.pad_id, tokenizer.sep_id]
    assert [tokenizer.decode(row) for row in table.tolist()] == ["The red", "The", "The old"]
    err = capsys.readouterr().err
    assert "2 of 3 sentences are longer than --sequence_len 4" in err
    assert "cut (--long_lines truncate)" in err


def test_exact_length_is_not_too_long(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    encoded = tokenizer.encode(["The red apple is ripe."])
    assert fit(encoded, 8, tokenizer, "error", "text").tolist() == encoded
    assert capsys.readouterr().err == ""


def test_drop(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    encoded = tokenizer.encode(["The red apple is ripe.", "The", "The old egg is hot."])
    table = fit(encoded, 4, tokenizer, "drop", "text")
    assert [tokenizer.decode(row) for row in table.tolist()] == ["The"]
    assert "left out (--long_lines drop)" in capsys.readouterr().err
    with pytest.raises(UserError, match="text: expected sentences of at most 4 tokens"):
        fit(encoded[:1], 4, tokenizer, "drop", "text")


def test_error_names_the_sentence(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(["The", "The red apple is ripe.", "The old egg is hot."])
    with pytest.raises(UserError, match=r"text: 2 of 3 sentences .*first in line 2 with 8 tokens"):
        fit(encoded, 4, tokenizer, "error", "text")


def test_error_names_the_line_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number is what an editor shows, blank and held-out lines counted."""
    path = write_text(tmp_path / "my.txt", ["", "", *LINES, "", "The red red red red red apple."])
    options = flags(dataset=path, checkpoint_path=tmp_path / "run", sequence_len=8, long_lines="error")
    assert training.main(options) == 1
    assert f"line {len(LINES) + 4} " in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ([3], 3),
        ([3, 9, 5], 9),
        ([5] * 998 + [40] * 2, 40),  # 99.8 % fit in 5
        ([5] * 999 + [40], 5),
        ([5] * 1998 + [40, 41], 5),
        ([LONGEST_CHOSEN + 1] * 10, LONGEST_CHOSEN),
        ([LONGEST_CHOSEN] * 10, LONGEST_CHOSEN),
    ],
)
def test_chosen_length_fits_nearly_all(lengths: list[int], chosen: int) -> None:
    assert choose_length([[0] * length for length in lengths]) == chosen


# Batches


def rows(batches: Batches, first: int, last: int) -> list[int]:
    """The rows that the batches first..last-1 take, when row i of the corpus is [i]."""
    return [row for step in range(first, last) for row in batches.batch(step)[:, 0].tolist()]


def numbered(n: int, batch_size: int, seed: int = 0) -> Batches:
    return Batches(torch.arange(n)[:, None], batch_size, seed)


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 4), (4, 17)])
def test_every_epoch_is_a_permutation(n: int, batch_size: int) -> None:
    """The stream of rows, cut at every n-th, whether or not batches end there, or are larger than the corpus."""
    batches = numbered(n, batch_size)
    assert all(batches.batch(step).shape == (batch_size, 1) for step in range(3))
    stream = rows(batches, 0, 6 * n)
    epochs = [stream[i : i + n] for i in range(0, len(stream) - n + 1, n)]
    assert len(epochs) >= 6
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 5:
        assert len(set(map(tuple, epochs))) == len(epochs), "orders differ"


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (7, 3), (3, 8)])
def test_batch_does_not_depend_on_history(n: int, batch_size: int) -> None:
    in_order = numbered(n, batch_size)
    expected = [in_order.batch(step) for step in range(30)]
    backwards = numbered(n, batch_size)
    for step in reversed(range(30)):
        assert torch.equal(backwards.batch(step), expected[step])
        assert torch.equal(backwards.batch(step), expected[step])
    for step in (29, 3, 17, 4):
        assert torch.equal(numbered(n, batch_size).batch(step), expected[step])


def test_first_sentences_of_the_stream() -> None:
    """What the first batches hold, also past the end of the text; with what they are given."""
    plain = numbered(10, 4, 7)
    expected = torch.cat([plain.batch(step) for step in range(7)])
    batches = Batches(plain.ids, 4, 7, plain.ids[:, 0] + 100)
    ids, given = batches.first(25)
    assert torch.equal(ids, expected[:25])
    assert given is not None
    assert torch.equal(given, ids[:, 0] + 100)
    assert plain.first(3)[1] is None


def test_past_epochs_are_forgotten() -> None:
    """Their orders would fill the memory of a long run on a small text."""
    batches = numbered(5, 3)
    rows(batches, 0, 200)
    assert len(batches._orders) <= 2


def test_seeds_differ() -> None:
    orders = {tuple(rows(numbered(50, 10, seed), 0, 5)) for seed in range(5)}
    assert len(orders) == 5
    assert tuple(range(50)) not in orders


def test_batch_holds_whole_sentences(tokenizer: Tokenizer) -> None:
    batches = Batches(fit(tokenizer.encode(LINES), 8, tokenizer, "error", "text"), 32, 1)
    assert {tokenizer.decode(ids) for ids in batches.batch(3).tolist()} <= set(LINES)


# Splitting


def same(line: str) -> str:
    return " ".join(line.split()).casefold()


@pytest.mark.parametrize(
    ("distinct", "held_out"), [(1, 0), (2, 1), (19, 1), (21, 2), (80, 4), (9_999, 500), (40_000, 500)]
)
def test_share_that_is_held_out(distinct: int, held_out: int) -> None:
    lines = [f"line {i}" for i in range(distinct)]
    train, test = corpora.split(lines)
    assert len(test) == held_out
    assert len(train) == distinct - held_out
    assert sorted(train + test) == sorted(lines)


def test_nothing_leaks() -> None:
    """Repetitions and variants in case and spacing go where the sentence goes; those of training all stay, in order."""
    lines = [
        v for line in LINES for v in (line, line.upper(), line.replace(" ", "  "), f"  {line}", line, line.lower())
    ]
    lines += ["Straße", "STRASSE", "strasse"] * 3
    train, test = corpora.split(lines)
    assert {same(line) for line in train}.isdisjoint(map(same, test))
    assert len(test) == 5  # of 81 distinct lines
    assert len({same(line) for line in test}) == 5
    assert set(test) <= set(lines)
    assert train == [line for line in lines if same(line) not in set(map(same, test))]


def test_one_distinct_line_is_all_for_training() -> None:
    assert corpora.split(["one", "One", " one"]) == (["one", "One", " one"], [])


def test_split_is_always_the_same() -> None:
    first = corpora.split(LINES)
    torch.manual_seed(1)
    assert corpora.split(LINES) == first
    assert first[1] != LINES[:4], "not just the first lines"
