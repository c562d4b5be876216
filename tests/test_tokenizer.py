"""Tokenizers give back what went in; the command that trains them writes what it says, or nothing."""

# ruff: noqa: RUF001  (letters that look like others are what is tested here)

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from toy import LINES, files, one_sentence, write_text

from text_diffusion import tokenizer
from text_diffusion.errors import UserError
from text_diffusion.tokenizer import SPECIAL_TOKENS, Tokenizer, train_byte_level, train_word_level

HARD = [
    "Hello, World!",
    "iPhone and IPHONE and iphone",
    "don't can't it's 'quoted' rock'n'roll",
    'He said "no" -- twice; then (quietly) [again] {and} <so on>...',
    "12 apples cost 3.50, or 1,000 in 2024",
    "a1b2 x_y snake_case kebab-case C++ C# 50% $5 #1 @home & co",
    "naïve café Ünïcödé señor Ærø",
    "combining e\u0301 and precomposed \u00e9",
    "ß ſ İ ı Σ σ ς",
    "日本語のテキスト。 中文，句子！ 한국어",
    "עברית العربية हिन्दी ไทย",
    "emoji 😀 👍🏽 👨‍👩‍👧 at the end 🎉",
    "tab\tinside and\ttwo\t\ttabs",
    "\tleading tab",
    "two  spaces   and    four",
    " one leading space",
    "   three leading spaces",
    "the [PAD] and the [SEP] as text",
    "[PAD]",
    "[CLS] x [SEP]",
    "[UNK][MASK]",
    "Ġ and Ċ and ▁ as text",
    "non\u00a0breaking\u00a0space and\u3000wide space",
    "zero\u200bwidth and a byte-order mark \ufeff inside",
    "a bell \x07 and an escape \x1b[31m sequence",
    "\\n is not a newline, nor is \\t a tab",
    "next\x85line, line\u2028and paragraph\u2029separators, \x0b\x0c\x1c\x1d\x1e and a carriage\rreturn",
    "x" * 300,
    ".",
    "'",
    '"',
]
TRAINERS = {"word-level": train_word_level, "byte-level": train_byte_level}
ALPHABET = "aabcdeXYZ0189 ..,,!'\"-()[]\t é ü ß 日本 😀 \u00a0\u0301Ġ"


def ids_of(trained: Tokenizer, text: str) -> list[int]:
    """Ids between [CLS] and [SEP]."""
    (ids,) = trained.encode([text])
    assert ids[0] == trained.cls_id
    assert ids[-1] == trained.sep_id
    return ids[1:-1]


def random_lines(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    lines = ("".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 40))).rstrip() for _ in range(count))
    return [line for line in lines if line]


@pytest.fixture(scope="module", params=list(TRAINERS))
def train(request: pytest.FixtureRequest) -> Callable[..., Tokenizer]:
    found: Callable[..., Tokenizer] = TRAINERS[request.param]
    return found


@pytest.fixture(scope="module")
def hard(train: Callable[..., Tokenizer]) -> Tokenizer:
    return train(HARD)


# Round trips


@pytest.mark.parametrize("line", HARD, ids=ascii)
def test_hard_lines_come_back(hard: Tokenizer, line: str) -> None:
    ids = ids_of(hard, line)
    assert hard.decode([hard.cls_id, *ids, hard.sep_id]) == line
    assert hard.decode(ids) == line
    assert not set(ids) & {hard.pad_id, hard.unk_id, hard.cls_id, hard.sep_id}


@pytest.mark.parametrize("seed", range(3))
def test_random_lines_come_back(train: Callable[..., Tokenizer], seed: int) -> None:
    lines = random_lines(seed, 400)
    trained = train(lines)
    assert [trained.decode(ids) for ids in trained.encode(lines)] == lines


def test_byte_level_gives_back_what_it_has_never_seen() -> None:
    trained = train_byte_level(LINES)
    lines = HARD + random_lines(9, 200)
    encoded = trained.encode(lines)
    assert [trained.decode(ids) for ids in encoded] == lines
    assert trained.unknown_share(encoded) == 0


def test_corpora_come_back(train: Callable[..., Tokenizer]) -> None:
    data = Path(__file__).resolve().parent.parent / "data"
    for name in ("simple-test.txt", "greetings-test.txt"):
        lines = (data / name).read_text(encoding="utf-8").splitlines()
        trained = train(lines)
        assert [trained.decode(ids) for ids in trained.encode(lines)] == lines


def test_lowercase(train: Callable[..., Tokenizer]) -> None:
    trained = train(["Hello World ÀÉ", "hello"], lowercase=True)
    assert trained.decode(ids_of(trained, "HELLO world àé")) == "hello world àé"
    assert ids_of(trained, "HELLO") == ids_of(trained, "hello")
    cased = train(["Hello World", "hello"])
    assert ids_of(cased, "Hello") != ids_of(cased, "hello")


# Words and ids


def test_a_word_is_the_same_token_everywhere(hard: Tokenizer) -> None:
    word = ids_of(hard, "twice")
    for before, after in (("", " twice"), ("twice ", " twice."), ("no -- ", "; then")):
        context = ids_of(hard, f"{before}twice{after}")
        assert any(context[i : i + len(word)] == word for i in range(len(context)))


def test_word_level_tokens_are_whole_words() -> None:
    trained = train_word_level(["The red apple, the red fig."])
    assert len(ids_of(trained, "The red apple, the red fig.")) == 8
    first, *_, last = ids_of(trained, "red apple red")
    assert first == last


def test_special_tokens_are_distinct(train: Callable[..., Tokenizer]) -> None:
    trained = train(LINES)
    vocab = trained.backend.get_vocab()
    assert len({vocab[token] for token in SPECIAL_TOKENS}) == len(SPECIAL_TOKENS)
    assert [trained.pad_id, trained.unk_id, trained.cls_id, trained.sep_id] == [
        vocab[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    ]
    assert sorted(vocab.values()) == list(range(trained.vocab_size))


def test_frequent_words_come_first() -> None:
    trained = train_word_level(["b b b a a c"])
    b, a, c = (ids_of(trained, word)[0] for word in "bac")
    assert b < a < c


def test_vocabulary_is_not_cut() -> None:
    """The library's own default stops at 30,000 words."""
    words = [f"w{''.join(chr(97 + int(digit)) for digit in str(i))}" for i in range(30_500)]
    lines = [" ".join(words[i : i + 100]) for i in range(0, len(words), 100)]
    trained = train_word_level(lines)
    assert trained.vocab_size == 30_500 + len(SPECIAL_TOKENS)
    assert trained.unknown_share(trained.encode(lines)) == 0


def test_vocab_size(train: Callable[..., Tokenizer]) -> None:
    lines = [*LINES, *LINES, "zebra yak quagga"]
    whole = train(lines).vocab_size
    size = 270 if train is train_byte_level else 15
    cut = train(lines, vocab_size=size)
    assert cut.vocab_size == size < whole
    if train is train_word_level:
        assert ids_of(cut, "The zebra.")[1] == cut.unk_id, "the rarest words go"
        assert cut.unk_id not in ids_of(cut, "The.")


def test_unknown_words_are_counted() -> None:
    trained = train_word_level(["The red apple."])
    encoded = trained.encode(["The blue apple.", "The red apple."])
    assert encoded[0].count(trained.unk_id) == 1
    assert trained.unknown_share(encoded) == 1 / 8
    assert trained.unknown_share([]) == 0
    assert trained.decode(encoded[0]) == "The apple."


# Decoding


def test_decoding_stops_at_the_end_of_the_sentence(hard: Tokenizer) -> None:
    one, two = ids_of(hard, "Hello, World!"), ids_of(hard, "twice")
    ids = [hard.cls_id, *one, hard.sep_id, *two, hard.sep_id, hard.pad_id]
    assert hard.decode(ids) == "Hello, World!"
    assert hard.decode_all(ids) == "Hello, World! twice"
    assert hard.decode([hard.sep_id, *one]) == ""
    assert hard.decode([]) == ""


def test_special_tokens_are_dropped(hard: Tokenizer) -> None:
    mask = hard.backend.get_vocab()["[MASK]"]
    ids = [hard.pad_id, hard.cls_id]
    for i in ids_of(hard, "Hello, World!"):
        ids += [i, hard.unk_id, hard.cls_id, mask, hard.pad_id]
    assert hard.decode(ids) == "Hello, World!"


def test_decoded_text_is_one_line() -> None:
    """A byte-level model may write any byte, newlines and broken characters included."""
    trained = train_byte_level(LINES)
    vocab = trained.backend.get_vocab()
    tokens = [vocab[token] for token in ("a", "Ċ", "b", "č", "Ċ", "c", "Ã")]
    text = trained.decode(tokens)
    assert text == "a b\r c\ufffd"


# Files


def test_file_is_read_by_the_library(train: Callable[..., Tokenizer], tmp_path: Path) -> None:
    trained = train(HARD)
    path = tmp_path / "deep" / "vocab.json"
    tokenizer.save(trained, path)
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), Tokenizer.from_file(path)
    lines = [line for line in HARD if "[" not in line]
    assert [theirs.encode(line).ids for line in lines] == trained.encode(lines) == ours.encode(lines)
    assert [theirs.decode(theirs.encode(line).ids) for line in lines] == lines
    assert ours.encode(HARD) == trained.encode(HARD)
    assert Tokenizer.from_json(trained.to_json()).encode(HARD) == trained.encode(HARD)
    assert path.read_text(encoding="utf-8") == json.dumps(json.loads(trained.to_json()), ensure_ascii=False, indent=1)


def test_training_is_deterministic(train: Callable[..., Tokenizer]) -> None:
    assert train(HARD).to_json() == train(HARD).to_json()


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"version": "1.0"}'])
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"vocab\.json: expected the JSON of a `tokenizers` tokenizer"):
        Tokenizer.from_file(path)
    with pytest.raises(UserError, match=r"none\.json: expected a tokenizer's JSON file, found none"):
        Tokenizer.from_file(tmp_path / "none.json")


@pytest.mark.parametrize("missing", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
def test_tokenizer_without_special_tokens_is_refused(missing: str) -> None:
    vocab = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "word")) if token != missing}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="word"))
    with pytest.raises(UserError, match=rf"mine: .*found one without \{missing}"):
        Tokenizer.from_json(backend.to_str(), "mine")


def test_ids_with_a_gap(tmp_path: Path) -> None:
    """An embedding has a row for each id, so the largest counts, not the number of words."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "word": 10}
    trained = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]")))
    assert trained.vocab_size > max(ids_of(trained, "word"))


def test_tokenizer_that_knows_no_unknown_words() -> None:
    """The library then raises at the first unknown word; better now, in a sentence."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "word": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    with pytest.raises(UserError, match="mine"):
        Tokenizer.from_json(backend.to_str(), "mine").encode(["another"])


# The command


@pytest.mark.parametrize("kind", list(TRAINERS))
def test_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_text(tmp_path / "my.txt", HARD)
    assert tokenizer.main([f"train-{kind}", str(path)]) == 0
    made = tmp_path / f"{kind}-vocab.json"
    assert sorted(files(tmp_path)) == sorted([made.name, "my.txt"])
    assert Tokenizer.from_file(made).encode(HARD) == TRAINERS[kind](HARD).encode(HARD)
    out, err = capsys.readouterr()
    assert f"{len(HARD)} of {len(HARD)} lines decode to themselves" in out
    assert out.splitlines()[-1] == f"written the tokenizer to {made}"
    assert err == ""


def test_command_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_text(tmp_path / "my.txt", [*LINES, "A RARE WORD"]), tmp_path / "new" / "v.json"
    assert tokenizer.main(["train-word-level", str(path), "--out", str(out), "--vocab_size", "12", "--lowercase"]) == 0
    assert sorted(files(tmp_path)) == ["my.txt", "new/v.json"]
    trained = Tokenizer.from_file(out)
    assert trained.vocab_size == 12
    assert ids_of(trained, "THE") == ids_of(trained, "the")
    assert "12 tokens from 81 lines" in capsys.readouterr().out


def test_command_reads_windows_files(tmp_path: Path) -> None:
    """Byte-order mark, CRLF and blank lines are no part of the sentences."""
    path = tmp_path / "my.txt"
    path.write_bytes("\ufeffone two\r\n\r\n  \r\nthree\r\n".encode())
    assert tokenizer.main(["train-word-level", str(path)]) == 0
    trained = Tokenizer.from_file(tmp_path / "word-level-vocab.json")
    assert trained.backend.get_vocab().keys() - set(SPECIAL_TOKENS) == {"Ġone", "Ġtwo", "Ġthree"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "No such file"),
        (b"", "found an empty file"),
        (b"\n  \n\t\r\n", "found only blank lines"),
        (b"one\ntw\x00o\n", "found a binary file (a zero byte at offset 6)"),
        ("one\ntwö\n".encode("utf-16"), "expected UTF-8, found UTF-16; save it as UTF-8"),
        (b"one\ntwo\nthr\xe9e\n", "expected UTF-8, found byte 0xe9 in line 3"),
        (b"\xff\xd8\xff\xe1 jpg", "expected UTF-8, found byte 0xff in line 1"),
    ],
)
def test_unfit_texts(raw: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.txt"
    if raw is not None:
        path.write_bytes(raw)
    before = files(tmp_path)
    for kind in TRAINERS:
        assert tokenizer.main([f"train-{kind}", str(path)]) == 1
        error = one_sentence(capsys.readouterr().err)
        assert message in error
        assert str(path) in error
    assert files(tmp_path) == before


def test_the_text_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_text(tmp_path / "my.txt", ["one two", "two three"])
    before = path.read_bytes()
    for given, message in (
        ([str(path), "--out", str(path)], "expected a file of its own to write to"),
        ([str(path), "--out", "gs://bucket/vocab.json"], "expected a file on this machine to write to"),
        (["gs://bucket/my.txt"], "gs://bucket/my.txt: expected --out FILE beside a text in a store"),
    ):
        assert tokenizer.main(["train-word-level", *given]) == 1
        assert message in one_sentence(capsys.readouterr().err)
    assert path.read_bytes() == before


def test_folder_in_place_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenizer.main(["train-word-level", str(tmp_path)]) == 1
    assert "Is a directory" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train-word-level", "FILE", "--vocab_size", "5"], "--vocab_size must be at least 6, found 5"),
        (["train-word-level", "FILE", "--vocab_size", "0"], "--vocab_size must be at least 6, found 0"),
        (["train-byte-level", "FILE", "--vocab_size", "260"], "--vocab_size must be at least 261, found 260"),
        (["train-byte-level", "FILE", "--vocab_size", "x"], "invalid int value: 'x'"),
        (["train-byte-level", "FILE", "--vocab", "300"], "unrecognized arguments: --vocab 300"),
        (["train-word-level"], "FILE"),
        (["train-sentencepiece", "FILE"], "train-sentencepiece"),
        ([], "train-word-level|train-byte-level"),
        (["train-word-level", "FILE", "--out", "FILE/v.json"], "expected a folder to write to, found a file"),
    ],
)
def test_unfit_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text(tmp_path / "my.txt", LINES)
    before = files(tmp_path)
    assert tokenizer.main([argument.replace("FILE", str(path)) for argument in arguments]) == 1
    assert message in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == before


@pytest.mark.parametrize(("kind", "smallest"), [("word-level", 6), ("byte-level", 261)])
def test_smallest_vocabulary(kind: str, smallest: int, tmp_path: Path) -> None:
    path = write_text(tmp_path / "my.txt", LINES)
    assert tokenizer.main([f"train-{kind}", str(path), "--vocab_size", str(smallest)]) == 0
    assert Tokenizer.from_file(tmp_path / f"{kind}-vocab.json").vocab_size == smallest
