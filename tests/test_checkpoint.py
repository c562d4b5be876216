"""Files of weights: complete in themselves, whole or absent, read without running anything, ours or the original's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from toy import (
    LINES,
    SIZES,
    contents,
    files,
    flags,
    no_file_above,
    one_sentence,
    same,
    train_flags,
    weights_of,
)

import text_diffusion
from text_diffusion import checkpoint, sample, train
from text_diffusion import tokenizer as our_tokenizers
from text_diffusion.checkpoint import opt_path, resumable_steps, weights_path
from text_diffusion.errors import UserError
from text_diffusion.files import check_writable, read_lines, write_atomically
from text_diffusion.run import prepare
from text_diffusion.tokenizer import Tokenizer, train_word_level

CPU = torch.device("cpu")
RAW, EMA, OPT = "model000006.pt", "ema_0.9_000006.pt", "opt000006.pt"


def sampled(capsys: pytest.CaptureFixture[str], path: Path, **options: Any) -> list[str]:
    """The sentences that the command writes to the file that it names."""
    assert sample.main(flags(model_name_or_path=path, show=0, **options)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    return Path(last.removeprefix("written the decoded output to ")).read_text(encoding="utf-8").splitlines()


def refused(capsys: pytest.CaptureFixture[str], path: Path, **options: Any) -> str:
    """The sentence with which the command refuses a file."""
    assert sample.main(flags(model_name_or_path=path, show=0, **options)) == 1
    return one_sentence(capsys.readouterr().err)


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
    clone: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere" / RAW
    assert "`bash scripts/run_train.sh` makes some" in refused(capsys, missing)
    (clone / "ckpts" / "toy").mkdir()
    for name in (RAW, OPT):
        shutil.copyfile(trained / name, clone / "ckpts" / "toy" / name)
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


# The original's files


def original_state(vocab_size: int, layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the original's denoiser: D = 8, H = 24, C = 16, L = 10."""
    generator = torch.Generator().manual_seed(seed)
    D, H, C, L = 8, 24, 16, 10

    def linear(name: str, inputs: int, outputs: int, scale: float = 1.0) -> dict[str, Tensor]:
        return {
            f"{name}.weight": scale * inputs**-0.5 * torch.randn(outputs, inputs, generator=generator),
            f"{name}.bias": 0.1 * torch.randn(outputs, generator=generator),
        }

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(H), f"{name}.bias": torch.zeros(H)}

    state = {"position_ids": torch.arange(L)[None]}
    state |= linear("time_embed.0", C, 4 * C) | linear("time_embed.2", 4 * C, H)
    state |= linear("input_up_proj.0", D, H) | linear("input_up_proj.2", H, H, scale=5)
    state |= linear("output_down_proj.0", H, H) | linear("output_down_proj.2", H, D, scale=5)
    for n in range(layers):
        layer = f"input_transformers.layer.{n}"
        for part in ("query", "key", "value"):
            state |= linear(f"{layer}.attention.self.{part}", H, H)
        state |= linear(f"{layer}.attention.output.dense", H, H) | norm(f"{layer}.attention.output.LayerNorm")
        state |= linear(f"{layer}.intermediate.dense", H, 4 * H)
        state |= linear(f"{layer}.output.dense", 4 * H, H) | norm(f"{layer}.output.LayerNorm")
    state |= norm("LayerNorm") | linear("lm_head", D, vocab_size)
    state["word_embedding.weight"] = torch.randn(vocab_size, D, generator=generator)
    state["position_embeddings.weight"] = torch.randn(L, H, generator=generator)
    state["lm_head.weight"] = torch.randn(vocab_size, D, generator=generator)  # stale, as in its EMA files
    return state


def original_vocabulary(pre_tokenizer: Any) -> tokenizers.Tokenizer:
    """A word-level vocabulary as the original makes one: other ids for the special tokens, no decoder."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "red", "blue", "apple", "fig", "is", "ripe", "."]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(words[:5])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return backend


ARGS = {"diffusion_steps": 40, "noise_schedule": "sqrt", "sequence_len": 9, "rescale_timesteps": True, "num_heads": 4}


@pytest.fixture(params=["Whitespace", "BertPreTokenizer"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Files of the original: weights with their settings beside them, and the vocabulary, elsewhere."""
    backend = original_vocabulary(getattr(pre_tokenizers, request.param)())
    vocab = tmp_path / "data" / "word-level-vocab.json"
    vocab.parent.mkdir()
    backend.save(str(vocab))
    weights = tmp_path / "ckpts" / "ema_0.9999_025001.pt"
    weights.parent.mkdir()
    torch.save(original_state(backend.get_vocab_size()), weights)
    (weights.parent / "training_args.json").write_text(json.dumps(ARGS))
    return weights, vocab


def test_original_is_sampled_from(original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocab = original
    sentences = sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20)
    words = [word for sentence in sentences for word in sentence.split(" ") if word]
    assert set(words) <= set(tokenizers.Tokenizer.from_file(str(vocab)).get_vocab())
    assert len(set(words)) > 4
    assert not any(word.startswith("[") for word in words)
    model = text_diffusion.generation.load_diffusion(weights, tokenizer=str(vocab))
    assert sentences == model.sample(30, steps=20)
    assert (model.sequence_len, model.diffusion.num_timesteps, model.diffusion.time_scale) == (9, 40, 25.0)
    assert (model.model.config.num_heads, model.model.config.num_layers, model.model.config.norm) == (12, 2, "post")


def test_original_s_time_scale(original: tuple[Path, Path]) -> None:
    """Unscaled timesteps if it was trained so."""
    weights, vocab = original
    weights.with_name("training_args.json").write_text(json.dumps(ARGS | {"rescale_timesteps": False}))
    assert text_diffusion.generation.load_diffusion(weights, tokenizer=str(vocab)).diffusion.time_scale == 1


def test_original_s_stale_head_is_ignored(original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocab = original
    sentences = sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20)
    state = contents(weights)
    torch.save(state | {"lm_head.weight": torch.zeros_like(state["lm_head.weight"])}, weights)
    assert sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20) == sentences
    embedding = state["word_embedding.weight"].flip(0)
    torch.save(state | {"word_embedding.weight": embedding}, weights)
    assert sampled(capsys, weights, tokenizer=vocab, num_samples=30, steps=20) != sentences


def test_original_needs_its_vocabulary(original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    weights, vocab = original
    assert "give its file as --tokenizer FILE" in refused(capsys, weights)
    torch.save(original_state(20), weights)
    assert "expected a tokenizer with 20 tokens, found one with 13" in refused(capsys, weights, tokenizer=vocab)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (None, "need their training_args.json beside them"),
        ("{", "expected the original's settings"),
        ("[]", "expected the original's settings"),
        ("null", "expected the original's settings"),
        (json.dumps(ARGS | {"noise_schedule": "nope"}), "'nope'"),
        (json.dumps(ARGS | {"diffusion_steps": "many"}), "'many'"),
        *(
            (json.dumps({key: value for key, value in ARGS.items() if key != name}), f"found a problem with '{name}'")
            for name in ("diffusion_steps", "noise_schedule", "sequence_len")
        ),
    ],
)
def test_original_needs_its_settings(
    args: str | None, message: str, original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, vocab = original
    settings = weights.with_name("training_args.json")
    settings.unlink()
    if args is not None:
        settings.write_text(args)
    assert message in refused(capsys, weights, tokenizer=vocab)


@pytest.mark.parametrize(
    "name", ["word_embedding.weight", "lm_head.bias", "input_transformers.layer.1.output.dense.bias"]
)
def test_original_with_a_part_missing(
    name: str, original: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, vocab = original
    torch.save({key: value for key, value in contents(weights).items() if key != name}, weights)
    assert name in refused(capsys, weights, tokenizer=vocab)


# Writing


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model000001.pt"
    path.write_bytes(b"old")

    def fails(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        raise error

    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("torch's way\nto say so"),
        ValueError("a bug"),
        KeyboardInterrupt(),
    ):
        expected = UserError if isinstance(error, (OSError, RuntimeError)) else type(error)
        with pytest.raises(expected) as caught:
            write_atomically(path, fails)
        if expected is UserError:
            assert str(caught.value).startswith(f"{path}: cannot be written: ")
            assert "\n" not in str(caught.value)
        assert files(tmp_path) == {path.name: b"old"}


def test_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"two"):
        write_atomically(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
        assert files(tmp_path) == {"a/b/file": content}


def test_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"n")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"ew")

    write_atomically(path, write)
    assert path.read_bytes() == b"new"


def test_write_is_on_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spied_fsync(number: int) -> None:
        order.append("fsync")
        fsync(number)

    def spied_replace(path: Path, to: Path) -> Path:
        order.append("replace")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(Path, "replace", spied_replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert order[:2] == ["fsync", "replace"]


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{folder}: expected a folder to write to, found: "):
            check_writable(folder)
        with pytest.raises(UserError, match="cannot be written"):
            write_atomically(folder / "x", lambda file: file.write(b"x"))
    check_writable(tmp_path / "new" / "folder")
    assert set(files(tmp_path)) == {"file"}


@pytest.mark.parametrize("share", [0.5, 2.0], ids=["no weights fit", "only weights fit"])
def test_full_disk(
    share: float, corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saving fails with a sentence; the checkpoint before is whole, and training goes on from it once there is room."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(trained, folder)
    shutil.copytree(trained, whole)
    before = {name: content for name, content in files(folder).items() if name.endswith(".pt")}
    limit = int(share * (trained / RAW).stat().st_size)
    assert limit < (trained / OPT).stat().st_size
    options = train_flags(corpus, folder, steps=9, save_interval=3, log_interval=2)
    with no_file_above(limit):
        assert train.main(options) == 1
    assert "000009.pt: cannot be written" in one_sentence(capsys.readouterr().err)
    after = files(folder)
    assert before.items() <= after.items()
    assert not [name for name in after if name.endswith(".tmp") or name.startswith("opt000009")]

    assert train.main(options) == 0
    assert "going on from step 6" in capsys.readouterr().err
    assert train.main(train_flags(corpus, whole, steps=9, save_interval=3, log_interval=2)) == 0
    assert same(weights_of(folder), weights_of(whole))


def test_full_disk_takes_no_weights_that_were_there(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint whose opt file has gone, made a second time."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / OPT).unlink()
    before = {name for name in files(folder) if name.endswith(".pt")}
    with no_file_above(2 * (trained / RAW).stat().st_size):
        assert train.main(train_flags(corpus, folder, steps=6, save_interval=3, log_interval=2)) == 1
    assert f"{OPT}: cannot be written" in one_sentence(capsys.readouterr().err)
    assert {name for name in files(folder) if name.endswith(".pt")} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_under_the_metrics(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert train.main(train_flags(corpus, tmp_path, steps=2, log_interval=1)) == 1
    assert "No space left on device" in one_sentence(capsys.readouterr().err)


def test_toy_sizes_are_toy_sizes(trained: Path) -> None:
    """What the tests above take for granted of their fixture."""
    assert contents(trained / RAW)["model"].items() >= {"hidden_size": SIZES["hidden_size"]}.items()
