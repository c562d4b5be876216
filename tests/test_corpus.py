"""Which texts a run learns from: by name, by path, split, read."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import LINES, SIZES, contents, files, flags, one_sentence, train_flags, write_text

from text_diffusion import corpus as corpora
from text_diffusion import tokenizer as tokenizers
from text_diffusion import train as training
from text_diffusion.config import DataConfig
from text_diffusion.files import read_lines, where
from text_diffusion.tokenizer import train_word_level

TINY = SIZES | {"steps": 1}


def test_by_name(toy_clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = corpora.load(DataConfig(dataset="toy"), tmp_path / "run")
    assert (corpus.name, corpus.train, corpus.held_out) == ("toy", LINES[:70], LINES[70:])
    assert not corpus.was_split
    assert corpus.vocab_folder == toy_clone / "data" / "toy"
    assert capsys.readouterr().err == ""


def test_by_name_without_test_file(toy_clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy_clone / "data" / "toy-test.txt").unlink()
    corpus = corpora.load(DataConfig(dataset="toy"), tmp_path / "run")
    assert corpus.was_split
    assert (corpus.train, corpus.held_out) == corpora.split(LINES[:70])
    assert "66 lines to train on, 4 different ones held out" in capsys.readouterr().err


def test_by_path(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(tmp_path)
    found = corpora.load(DataConfig(dataset=str(corpus)), tmp_path)
    assert found.name == "toy"
    assert (found.train, found.held_out) == corpora.split(LINES)
    assert found.vocab_folder == tmp_path
    assert files(tmp_path) == before, "finding a corpus writes nothing"
    assert "76 lines to train on, 4 different ones held out" in capsys.readouterr().err


def test_parts_are_written(corpus: Path, tmp_path: Path) -> None:
    found = corpora.load(DataConfig(dataset=str(corpus)), tmp_path)
    found.save_parts(tmp_path)
    assert read_lines(tmp_path / "toy-train.txt") == found.train
    assert read_lines(tmp_path / "toy-test.txt") == found.held_out


def test_by_training_text(toy_clone: Path, tmp_path: Path) -> None:
    mine = write_text(tmp_path / "mine.txt", LINES[:20])
    corpus = corpora.load(DataConfig(dataset="toy", train_txt_path=str(mine)), tmp_path)
    assert corpus.source == mine
    assert (corpus.train, corpus.held_out) == corpora.split(LINES[:20])


def test_by_held_out_text(toy_clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = write_text(tmp_path / "mine.txt", [*LINES[70:75], LINES[0].upper(), f" {LINES[1]}"])
    corpus = corpora.load(DataConfig(dataset="toy", val_txt_path=str(mine)), tmp_path)
    assert (corpus.train, corpus.held_out) == (LINES[:70], read_lines(mine))
    assert "warning: 2 of 7 held-out lines are also in the training text" in capsys.readouterr().err
    both = DataConfig(dataset="toy", train_txt_path=str(toy_clone / "data" / "other-train.txt"), val_txt_path=str(mine))
    corpus = corpora.load(both, tmp_path)
    assert not corpus.was_split
    assert (len(corpus.train), len(corpus.held_out)) == (70, 7)


@pytest.mark.parametrize("dataset", ["tay", "", "..", "Toy"])
def test_unknown_name_lists_those_that_are_there(
    dataset: str, toy_clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(flags(dataset=dataset)) == 1
    error = one_sentence(capsys.readouterr().err)
    assert "one of other, toy in" in error
    assert f"found {dataset!r}" in error
    assert sorted(files(toy_clone / "ckpts")) == []


def test_name_wins_over_a_file_in_the_working_directory(
    toy_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "toy", ["something else"])
    write_text(tmp_path / "mine", LINES[:10])
    assert corpora.load(DataConfig(dataset="toy"), tmp_path).train == LINES[:70]
    assert len(corpora.load(DataConfig(dataset="mine"), tmp_path).train) == 9


@pytest.mark.parametrize("dataset", ["toy.v2", "no/such.txt"])
def test_missing_file_lists_the_names_too(
    dataset: str, toy_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert training.main(flags(dataset=dataset)) == 1
    error = one_sentence(capsys.readouterr().err)
    assert "one of other, toy in" in error
    assert error.endswith(f"found {dataset!r}, which is no file")


@pytest.mark.parametrize("dataset", ["./toy", "../data/toy", "ROOT/data/toy"])
def test_path_is_no_name(
    dataset: str, toy_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has a slash in it is the path of a file, and here there is none."""
    monkeypatch.chdir(tmp_path)
    before = files(toy_clone)
    assert training.main(flags(dataset=dataset.replace("ROOT", str(toy_clone)), **TINY)) == 1
    assert "which is no file" in one_sentence(capsys.readouterr().err)
    assert files(toy_clone) == before


def test_relative_paths_mean_the_working_directory(
    toy_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the data as of the run; a dataset by name and its run are the clone's wherever one is."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_text(elsewhere / "mine.txt", LINES)
    monkeypatch.chdir(elsewhere)
    assert training.main(train_flags(Path("mine.txt"), Path("run"), steps=1)) == 0
    assert (elsewhere / "run" / "opt000001.pt").is_file()
    assert training.main(flags(dataset="toy", **TINY)) == 0
    assert (toy_clone / "ckpts" / "toy" / "opt000001.pt").is_file()
    assert (toy_clone / "data" / "toy" / "word-level-vocab.json").is_file()
    assert sorted({name.split("/")[0] for name in files(elsewhere)}) == ["mine.txt", "run"]


def test_default_folder_is_named_after_the_file(toy_clone: Path, corpus: Path) -> None:
    assert training.main(flags(dataset=corpus, **TINY)) == 0
    assert (toy_clone / "ckpts" / "toy" / "model000001.pt").is_file()


def test_unknown_words_are_reported(toy_clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 of 6 held-out tokens, twice; the training text has none."""
    mine = write_text(tmp_path / "mine.txt", ["The red melon is ripe.", "The blue fig is mouldy."])
    options = train_flags(Path("toy"), tmp_path / "run", steps=1, val_txt_path=mine)
    assert training.main(options) == 0
    err = capsys.readouterr().err
    assert "70 training and 2 held-out sentences of up to 8 tokens" in err
    assert "unknown words: 0.00% in training, 16.67% held out" in err
    assert "trained a word-level tokenizer" in err
    capsys.readouterr()
    assert training.main(train_flags(Path("toy"), tmp_path / "again", steps=1, tokenizer="byte-level")) == 0
    assert "0.00% held out" in capsys.readouterr().err


def test_tokenizer_of_a_dataset_is_used_as_it_is(
    toy_clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers.save(
        train_word_level([*LINES, "three more words"]), toy_clone / "data" / "toy" / "word-level-vocab.json"
    )
    before = files(toy_clone / "data")
    assert training.main(train_flags(Path("toy"), tmp_path / "run", steps=1)) == 0
    assert "24 in the vocabulary" in capsys.readouterr().err
    assert files(toy_clone / "data") == before


def test_tokenizer_beside_one_s_own_text_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As README has it: custom_tokenizer.py, then training; what it was trained with counts."""
    mine = write_text(tmp_path / "my.txt", LINES)
    assert tokenizers.main(["train-word-level", str(mine), "--lowercase"]) == 0
    capsys.readouterr()
    assert training.main(train_flags(mine, tmp_path / "run", steps=1)) == 0
    err = capsys.readouterr().err
    beside = tmp_path / "word-level-vocab.json"
    assert f"{beside}: used, as it lies beside the text; it may know words that only held-out lines have" in err
    assert "trained a" not in err
    kept = tokenizers.Tokenizer.from_json(contents(tmp_path / "run" / "opt000001.pt")["tokenizer"])
    assert kept.to_json() == tokenizers.Tokenizer.from_file(beside).to_json()
    assert kept.decode(kept.encode([LINES[0]])[0]) == LINES[0].lower()
    # Another kind is none of its business.
    assert training.main(train_flags(mine, tmp_path / "bytes", steps=1, tokenizer="byte-level")) == 0
    assert "trained a byte-level tokenizer" in capsys.readouterr().err


# Reading


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end(end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines and their numbers agree, also in a file that has carriage returns alone."""
    path = tmp_path / "my.txt"
    lines = [*LINES, "", "The red red red red red apple."]
    path.write_bytes(("\ufeff" + end.join(lines) + end).encode())
    assert read_lines(path) == [*LINES, lines[-1]]
    assert read_lines(path, blank=True) == lines
    assert where(path, lines[-1]) == f"in line {len(lines)}"
    assert training.main(train_flags(path, tmp_path / "run", sequence_len=8, long_lines="error")) == 1
    assert f"line {len(lines)} " in one_sentence(capsys.readouterr().err)


def test_carriage_return_inside_a_line_is_text(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(b"one\rtwo\nthree\r\r\n")
    assert read_lines(path) == ["one\rtwo", "three"]
    assert where(path, "one\rtwo") == "in line 1"


def test_lines_are_cut_at_newlines_only(tmp_path: Path) -> None:
    text = 'a\tb\n"quoted, twice"\nNA\nnull\n12\n\n one\u2028two \x0b\x85three \r\n\nend'
    path = tmp_path / "my.txt"
    path.write_bytes(text.encode())
    lines = ["a\tb", '"quoted, twice"', "NA", "null", "12", " one\u2028two \x0b\x85three", "end"]
    assert read_lines(path) == lines


def test_fingerprint_follows_the_training_lines(corpus: Path, tmp_path: Path) -> None:
    def fingerprint(lines: list[str]) -> str:
        mine, held = write_text(tmp_path / "mine.txt", lines), write_text(tmp_path / "held.txt", ["x"])
        config = DataConfig(train_txt_path=str(mine), val_txt_path=str(held))
        return corpora.load(config, tmp_path).fingerprint

    prints = [fingerprint(lines) for lines in (LINES, LINES[::-1], LINES[1:], [*LINES, "x"], LINES)]
    assert len(set(prints)) == 4
    assert prints[0] == prints[-1]
