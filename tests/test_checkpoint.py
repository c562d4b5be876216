"""Files of weights: complete in themselves, read without running anything, foreign ones refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy import (
    EMA,
    LINES,
    OPT,
    RAW,
    SIZES,
    contents,
    files,
    refused,
    same,
    sampled,
    train_flags,
)

import text_diffusion
from text_diffusion import checkpoint, train
from text_diffusion import tokenizer as our_tokenizers
from text_diffusion.checkpoint import opt_path, resumable_steps, weights_path
from text_diffusion.errors import UserError
from text_diffusion.files import read_lines
from text_diffusion.run import prepare
from text_diffusion.tokenizer import Tokenizer, train_word_level

CPU = torch.device("cpu")


# Names


def test_names(tmp_path: Path) -> None:
    assert weights_path(tmp_path, 12345).name == "model012345.pt"
    assert weights_path(tmp_path, 25000, 0.9999).name == "ema_0.9999_025000.pt"
    assert weights_path(tmp_path, 1_234_567, 0.5).name == "ema_0.5_1234567.pt"
    assert opt_path(tmp_path, 7).name == "opt000007.pt"


def test_files_of_a_run(trained: Path) -> None:
    names = {f"{kind}00000{step}.pt" for kind in ("model", "ema_0.9_", "opt") for step in (3, 6)}
    others = {"metrics.jsonl", "training_args.json", "toy-train.txt", "toy-test.txt", "word-level-vocab.json"}
    assert set(files(trained)) == names | others


def test_latest_comes_first(tmp_path: Path) -> None:
    for name in ("opt000009.pt", "opt000010.pt", "opt1000000.pt", "opt.pt", "optx.pt", "model000099.pt", "opt5.pt.tmp"):
        (tmp_path / name).touch()
    assert resumable_steps(tmp_path) == [1_000_000, 10, 9]
    assert resumable_steps(tmp_path / "none") == []


# What is in the files


def test_weights_in_the_files_are_those_in_memory(corpus: Path, tmp_path: Path) -> None:
    """Raw and averaged, the embedding included, which a tied head must not swap for the raw one."""
    given = train.parse(train_flags(corpus, tmp_path, steps=5, lr=0.01, ema_rate="0.2,0.9"))
    run, state = prepare(given)
    train.train(run, state)
    raw = dict(state.model.named_parameters())
    for rate, model in [(None, state.model), *((ema.rate, ema.model) for ema in state.emas)]:
        path = weights_path(tmp_path, 5, rate)
        weights = dict(model.named_parameters())
        assert same(contents(path)["state"], {name: weight.data for name, weight in weights.items()})
        loaded = checkpoint.load_weights(path, CPU).model
        assert loaded.lm_head.weight is loaded.word_embedding.weight
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
        if rate is not None:
            name = "word_embedding.weight"
            assert not torch.equal(weights[name], raw[name])
    assert not same(*(contents(weights_path(tmp_path, 5, rate))["state"] for rate in (0.2, 0.9)))


def test_tied_weight_is_stored_once(trained: Path) -> None:
    for name in (RAW, EMA):
        found = contents(trained / name)
        assert "word_embedding.weight" in found["state"]
        assert "lm_head.weight" not in found["state"]
        assert "lm_head.bias" in found["state"]
    storages = [tensor.untyped_storage().data_ptr() for tensor in contents(trained / RAW)["state"].values()]
    assert len(storages) == len(set(storages))


def test_files_hold_plain_values(trained: Path) -> None:
    """Each is read by torch's restricted reader, as `contents` does, and says what it is."""
    raw, ema, opt = (contents(trained / name) for name in (RAW, EMA, OPT))
    assert [part["format"] for part in (raw, ema, opt)] == [checkpoint.FORMAT] * 3
    assert [part["step"] for part in (raw, ema, opt)] == [6] * 3
    assert (raw["ema_rate"], ema["ema_rate"]) == (None, 0.9)
    assert raw["run"] == ema["run"] == opt["run"]
    assert ema["model"]["hidden_size"] == 16
    assert ema["diffusion"]["diffusion_steps"] == 20
    assert ema["sequence_len"] == 8
    expected = train_word_level(read_lines(trained / "toy-train.txt"))
    assert Tokenizer.from_json(ema["tokenizer"]).encode(LINES) == expected.encode(LINES)


def test_file_alone_is_enough(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied to a folder of its own, used from another one."""
    copy = tmp_path / "new name.pt"
    shutil.copyfile(writer, copy)
    monkeypatch.chdir("/")
    sentences = sampled(capsys, copy, num_samples=20)
    assert sentences == text_diffusion.load(str(writer)).sample(20)
    assert len(set(sentences)) > 5
    assert set(files(tmp_path)) == {copy.name, "new name.samples_20.steps-20.clamp-no_clamp.seed-10708.txt"}


def test_loading_changes_no_random_state(writer: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    text_diffusion.load(str(writer))
    assert torch.equal(torch.rand(2), expected)


# Files that will not do


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


def test_pickled_objects_are_not_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, path = tmp_path / "executed", tmp_path / "model000001.pt"
    for payload in (Touch(mark), contents(trained / RAW) | {"extra": Touch(mark)}):
        torch.save(payload, path)
        assert not mark.exists()
        assert "expected a whole checkpoint" in refused(capsys, path)
        assert not mark.exists()
    torch.load(path, weights_only=False)["extra"].close()
    assert mark.exists(), "the trap works"


def test_pickled_objects_are_not_run_when_a_run_goes_on(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "run"
    shutil.copytree(trained, folder)
    torch.save(contents(trained / OPT) | {"extra": Touch(mark)}, folder / OPT)
    assert train.main(train_flags(corpus, folder, steps=6, save_interval=3)) == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert not mark.exists()


def test_truncated_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = (trained / RAW).read_bytes()
    path = tmp_path / RAW
    for size in (0, 1, 10, 100, 1000, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        error = refused(capsys, path)
        assert f"{path}: expected a whole checkpoint, found a file that is truncated or of another kind" in error


def test_flipped_bytes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that can be read, of numbers that are others."""
    raw, path = bytearray((trained / RAW).read_bytes()), tmp_path / RAW
    place = raw.index(contents(trained / RAW)["state"]["word_embedding.weight"].numpy().tobytes())
    raw[place] ^= 0xFF
    path.write_bytes(raw)
    assert "expected a whole checkpoint, found bytes that do not fit their checksum" in refused(capsys, path)


def test_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures, archives, and text, whose first letter decides what torch's reader of pickles makes of it."""
    letters = (f"{chr(i)} text\n".encode() * 50 for i in range(32, 127))
    for content in (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500), b"PK\x03\x04" + bytes(200), *letters):
        (tmp_path / RAW).write_bytes(content)
        assert "expected a whole checkpoint, found a file" in refused(capsys, tmp_path / RAW)


def test_damaged_pickles(trained: Path, tmp_path: Path) -> None:
    """Single bytes of the pickled part are wrong; whatever torch makes of them, it ends in a UserError, or loads."""
    raw = (trained / RAW).read_bytes()
    path = tmp_path / RAW
    refusals = 0
    first = raw.index(b"\x80\x02}q")
    for i in range(first, first + 120):
        for byte in (0x2E, 0x30, 0x74, 0x65, 0xFF):  # STOP, POP, TUPLE, APPENDS, none
            path.write_bytes(raw[:i] + bytes([byte]) + raw[i + 1 :])
            try:
                checkpoint.read(path)
            except UserError:
                refusals += 1
    assert refusals > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a checkpoint, found a saved list"),
        (torch.zeros(3), "expected a checkpoint, found a saved Tensor"),
        ({}, "expected a weights file, found one without diffusion, model, sequence_len, state, tokenizer"),
        ({"a": torch.zeros(2)}, "expected a weights file, found one without diffusion"),
        ({"format": checkpoint.FORMAT + 1}, f"expected format {checkpoint.FORMAT}, found {checkpoint.FORMAT + 1}"),
        ({"format": "x"}, f"expected format {checkpoint.FORMAT}, found 'x'"),
    ],
    ids=str,
)
def test_foreign_contents(content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model000001.pt"
    torch.save(content, path)
    assert f"{path}: {message}" in refused(capsys, path)


@pytest.mark.parametrize("name", ["state", "model", "diffusion", "sequence_len", "tokenizer"])
def test_missing_and_unfit_parts(name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole = tmp_path / RAW, contents(trained / RAW)
    torch.save({key: value for key, value in whole.items() if key != name}, path)
    assert f"found one without {name}" in refused(capsys, path)
    if name == "sequence_len":
        return  # see below
    for value in (None, 5, "x", [1]):
        torch.save(whole | {name: value}, path)
        assert "expected" in refused(capsys, path)


@pytest.mark.parametrize("value", [None, "x", 9])
def test_unfit_length(value: object, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """9 is one more than there are position embeddings."""
    torch.save(contents(trained / RAW) | {"sequence_len": value}, tmp_path / RAW)
    refused(capsys, tmp_path / RAW)


def test_weights_of_another_shape(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, whole = tmp_path / RAW, contents(trained / RAW)
    state = whole["state"]
    name = "layers.0.qkv.weight"
    for other in (
        state | {name: state[name][:-1]},
        state | {"surplus": torch.zeros(1)},
        {key: value for key, value in state.items() if key != name},
    ):
        torch.save(whole | {"state": other}, path)
        assert f"{path}: the weights do not fit the model" in refused(capsys, path)
    torch.save(whole | {"tokenizer": train_word_level(["a b"]).to_json()}, path)
    assert (
        f"{path}: expected a tokenizer with {len(state['word_embedding.weight'])} tokens, found one with 7"
        in refused(capsys, path)
    )


def test_opt_file_in_place_of_weights(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sample from the model*.pt or ema_*.pt file beside it" in refused(capsys, trained / OPT)


def test_missing_file_lists_those_that_are_there(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, trained / "ema_0.9_000007.pt")
    assert f"only these in {trained}: ema_0.9_000003.pt, ema_0.9_000006.pt, model000003.pt, model000006.pt" in error
    assert "opt" not in error.split(str(trained))[-1]


def test_missing_file_elsewhere_lists_those_of_the_clone(
    toy_clone: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they have to be written here."""
    missing = tmp_path / "nowhere" / RAW
    assert "`bash scripts/run_train.sh` makes some" in refused(capsys, missing)
    (toy_clone / "ckpts" / "toy").mkdir()
    for name in (RAW, OPT):
        shutil.copyfile(trained / name, toy_clone / "ckpts" / "toy" / name)
    assert refused(capsys, missing).endswith(f"found none there; there are {toy_clone}/ckpts/toy/{RAW}")
    monkeypatch.chdir(toy_clone)
    assert refused(capsys, missing).endswith(f"found none there; there are ckpts/toy/{RAW}")


def test_folder_in_place_of_a_file(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert EMA in refused(capsys, trained)


def test_folder_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{trained}: expected a checkpoint, found" in refused(capsys, trained)


def test_tokenizer_must_be_the_one_of_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = trained / "word-level-vocab.json", tmp_path / "other.json"
    our_tokenizers.save(train_word_level([line.replace("red", "pink") for line in LINES]), other)
    assert sampled(capsys, trained / RAW, tokenizer=mine) == sampled(capsys, trained / RAW)
    error = refused(capsys, trained / RAW, tokenizer=other)
    assert f"{other}: expected the tokenizer that {trained / RAW} was trained with, found another vocabulary" in error
    assert "expected a tokenizer's JSON file" in refused(capsys, trained / RAW, tokenizer=tmp_path / "none.json")


def test_toy_sizes_are_toy_sizes(trained: Path) -> None:
    """What the tests above take for granted of their fixture."""
    assert contents(trained / RAW)["model"].items() >= {"hidden_size": SIZES["hidden_size"]}.items()
