"""Which checkpoint a run goes on from, and with which settings."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from toy import (
    COPIED,
    EMA,
    LINES,
    OPT,
    RAW,
    Trained,
    contents,
    everything,
    files,
    flags,
    metrics,
    one_sentence,
    same,
    train_flags,
    weights_of,
    write_text,
)

import text_diffusion
from text_diffusion import resuming, train
from text_diffusion.config import DiffusionConfig, ModelConfig, TrainConfig
from text_diffusion.tokenizer import train_word_level


@pytest.mark.parametrize("name", ["opt000006.pt", "model000006.pt", "ema_0.9_000006.pt"])
def test_damaged_checkpoint_is_passed_over(
    name: str, go: Trained, trained: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weights file that cannot be read is replaced if the run's own opt file names it."""
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[: len(whole) // 2])
    go(**COPIED)
    err = capsys.readouterr().err
    assert f"warning: passed over: {copied / name}: expected a whole checkpoint" in err
    assert "going on from step 3" in err
    assert not list(copied.glob("*.new.pt"))
    opt, expected = contents(copied / "opt000006.pt"), contents(trained / "opt000006.pt")
    assert same([opt[part] for part in ("optimizer", "emas")], [expected[part] for part in ("optimizer", "emas")])
    assert same(contents(copied / opt["weights"])["state"], contents(trained / "model000006.pt")["state"])
    assert metrics(copied) == metrics(trained)
    go(**COPIED | {"steps": 7})
    assert "going on from step 6" in capsys.readouterr().err


@pytest.mark.parametrize("name", [OPT, RAW, EMA])
def test_flipped_bytes_are_passed_over(
    name: str, go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is as long as it was, and can be read."""
    path = copied / name
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        start = content.index(archive.read(largest)) + largest.file_size // 2  # not in the padding between parts
    content[start : start + 8] = bytes(byte ^ 0xFF for byte in content[start : start + 8])
    path.write_bytes(content)
    go(**COPIED)
    err = capsys.readouterr().err
    assert "warning: passed over: " in err
    assert "going on from step 3" in err


def test_damaged_settings_file_is_written_again(go: Trained, copied: Path) -> None:
    path = copied / "training_args.json"
    whole = path.read_text()
    path.write_text(whole[:-5])
    go(**COPIED | {"steps": 7})
    assert json.loads(path.read_text())["train"]["steps"] == 7


def test_no_whole_checkpoint_left(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then nothing is overwritten: somebody may want to mend it."""
    for step in (3, 6):
        (copied / f"opt00000{step}.pt").write_bytes(b"")
    before = files(copied)
    go(status=1, **COPIED)
    assert f"{copied}: expected a whole checkpoint to go on from, found none" in one_sentence(capsys.readouterr().err)
    assert files(copied) == before


def test_foreign_file_under_the_name_of_a_checkpoint(
    go: Trained, trained: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(copied / "model000006.pt", copied / "opt000009.pt")
    go(**COPIED)
    assert "expected an opt file, found one without" in capsys.readouterr().err
    assert same(everything(copied, 6), everything(trained, 6))


def test_weights_of_another_run_in_the_place_of_one_s_own(
    go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied there by hand; training on from them would be neither run."""
    shutil.copyfile(go("other", **COPIED) / "model000006.pt", copied / "model000006.pt")
    before = files(copied)
    go(status=1, **COPIED | {"steps": 8})
    error = one_sentence(capsys.readouterr().err)
    assert f"{copied / 'model000006.pt'}: expected the weights of the run in this folder, found another run's" in error
    assert files(copied) == before


# Weights without an opt file


def test_weights_alone_are_no_run_to_go_on_with(
    go: Trained, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training starts at 0, and writes beside weights that stand under the very names that it would use."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(trained / "ema_0.9_000006.pt", folder / "ema_0.9_000003.pt")
    (folder / "ema_0.9_000006.pt").write_bytes(b"\xff\xd8\xff")
    (folder / "model000006.pt").write_bytes(b"")
    before = files(folder)
    go(**COPIED)
    out, err = capsys.readouterr()
    after = files(folder)
    assert "going on" not in err
    assert before.items() <= after.items()
    assert "ema_0.9_000006.pt cannot be read, nor is it known whose it is, and stays; written to ema_0.9_00" in err
    assert "ema_0.9_000003.pt belongs to another run and stays; written to ema_0.9_000003.new.pt instead" in err
    assert out.splitlines()[-1] == f"written the weights to {folder / 'ema_0.9_000006.new.pt'}"
    for name in ("ema_0.9_000003", "ema_0.9_000006", "model000006"):
        assert same(contents(folder / f"{name}.new.pt")["state"], contents(trained / f"{name}.pt")["state"])
    assert text_diffusion.load(str(folder / "ema_0.9_000006.new.pt")).sample(2, steps=3)

    capsys.readouterr()
    go(**COPIED | {"steps": 8})
    assert "going on from step 6" in capsys.readouterr().err
    assert before.items() <= files(folder).items()


def test_weights_of_three_runs_stay(go: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kept: dict[str, bytes] = {}
    for seed in (1, 2, 3):
        go(steps=2, seed=seed)
        (folder / "opt000002.pt").unlink()
        assert kept.items() <= files(folder).items()
        kept |= {name: content for name, content in files(folder).items() if name.endswith(".pt")}
    assert len(kept) == 6


# Running again, with the same flags or others


def test_complete_run_stays_as_it_is(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copied)
    go(**COPIED)
    out, err = capsys.readouterr()
    assert f"the run in {copied} is complete at step 6; a larger STEPS extends it" in err
    assert out == ""
    after = files(copied)
    args = [json.loads(part.pop("training_args.json")) for part in (before, after)]
    assert after == before
    assert args[0]["train"] | {"checkpoint_path": str(copied)} == args[1]["train"]


def test_run_is_extended(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(**COPIED | {"steps": 8})
    err = capsys.readouterr().err
    assert "going on from step 6" in err
    assert "STEPS was 6 and is 8: the learning-rate schedule changed" in err
    assert contents(copied / "opt000008.pt")["step"] == 8
    assert metrics(copied)[-1]["lr"] == pytest.approx(TrainConfig().lr * 8 / 100 * (1 - 7 / 8))
    go(**COPIED | {"steps": 8})
    assert "the learning-rate schedule changed" not in capsys.readouterr().err


def test_run_goes_on_with_its_own_settings(corpus: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only where and how far has to be given: sizes, text and tokenizer are the run's."""
    assert train.main(flags(checkpoint_path=copied, steps=7)) == 0
    assert "toy: 76 training" in capsys.readouterr().err
    assert contents(copied / "model000007.pt")["model"]["hidden_size"] == 16


def test_steps_below_the_present_step(go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copied)
    go(status=1, **COPIED | {"steps": 5})
    error = one_sentence(capsys.readouterr().err)
    assert f"STEPS must be at least 6, where the run in {copied} is, found 5" in error
    assert files(copied) == before


OTHERS: dict[str, object] = {
    "in_channel": 4, "hidden_size": 32, "num_layers": 2, "num_heads": 1, "num_channels": 4, "activation": "gelu",
    "norm": "post", "dropout": 0.1, "self_condition": False, "diffusion_steps": 10, "noise_schedule": "cosine",
    "schedule_sampler": "loss-second-moment", "tokenizer": "byte-level", "sequence_len": 7, "long_lines": "drop",
    "batch_size": 4, "seed": 1, "ema_rate": "0.9,0.99", "objective": "autoregressive", "stratified": True,
    "output_prior": False, "denoised_input": False, "output_scale": 2.0, "known_words": False,
    "shared_evidence": False, "condition": "labels", "drop_condition": 0.5, "source_len": 5, "denoiser": "modern",
    "optimizer": "adamw", "pretrained_model": "bert", "init_pretrained": True, "pretrained_embeddings": True,
    "freeze_embeddings": True, "least_evidence": 0.5, "neighbours": 1, "pairs": 10, "teacher_levels": 4,
}  # fmt: skip


def test_settings_of_a_run_for_life() -> None:
    """The table above is complete."""
    assert resuming.FIXED == OTHERS.keys()
    assert {*ModelConfig.__dataclass_fields__, *DiffusionConfig.__dataclass_fields__} < resuming.FIXED


@pytest.mark.parametrize("name", list(OTHERS))
def test_contradictions_are_refused(name: str, go: Trained, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(copied)
    go(status=1, **COPIED | {"steps": 8, name: OTHERS[name]})
    error = one_sentence(capsys.readouterr().err)
    assert f"the run in {copied} was started with --{name} " in error
    assert (
        f"found {OTHERS[name] if name != 'ema_rate' else (0.9, 0.99)}; give --checkpoint_path another folder" in error
    )
    assert files(copied) == before


def test_settings_that_are_repeated_are_no_contradiction(go: Trained, copied: Path) -> None:
    """The length chosen when the run was new, spelt out or left open."""
    for length in (0, 8):
        go(**COPIED | {"sequence_len": length, "seed": 102, "dropout": 0.0, "norm": "pre"})


def test_changed_text_is_refused(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, folder = write_text(tmp_path / "toy.txt", LINES), tmp_path / "run"
    assert train.main(train_flags(mine, folder, steps=2)) == 0
    write_text(mine, [*LINES, "One more line."])
    before = files(folder)
    capsys.readouterr()
    assert train.main(train_flags(mine, folder, steps=4)) == 1
    error = one_sentence(capsys.readouterr().err)
    assert f"{mine}: expected the text that the run in {folder} was started with, found another" in error
    assert files(folder) == before
    write_text(mine, LINES)
    assert train.main(train_flags(mine, folder, steps=4)) == 0


def test_run_keeps_its_tokenizer(go: Trained, copied: Path) -> None:
    """As the README does: the tokenizer is trained again beside the corpus, with other ids, and the run goes on."""
    path = copied / "word-level-vocab.json"
    vocab = json.loads(path.read_text())
    before = contents(copied / "opt000006.pt")["tokenizer"]
    ids = vocab["model"]["vocab"]
    ids["Ġred"], ids["Ġblue"] = ids["Ġblue"], ids["Ġred"]
    path.write_text(json.dumps(vocab))
    go(**COPIED | {"steps": 8})
    assert contents(copied / "opt000008.pt")["tokenizer"] == before


def test_tokenizer_by_another_path_or_changed(go: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in the file counts, not where it lies."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(train_word_level(LINES).to_json())
    folder = go(steps=1, tokenizer=first)
    before = contents(folder / "opt000001.pt")["tokenizer"]
    shutil.copy(first, second)
    go(steps=2, tokenizer=second)
    assert contents(folder / "opt000002.pt")["tokenizer"] == before
    second.unlink()
    go(steps=3, tokenizer=second)  # it is in the checkpoint
    capsys.readouterr()
    cases = ([*LINES, "more"], False), (LINES, True)
    for lines, lowercase in cases:
        second.write_text(train_word_level(lines, lowercase=lowercase).to_json())
        go(status=1, steps=4, tokenizer=second)
        assert f"{second}: expected the tokenizer that the run was started with" in one_sentence(
            capsys.readouterr().err
        )
    go(status=1, steps=4, tokenizer=tmp_path / "none.json")
    assert "expected a tokenizer's JSON file, found none" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("text", ['{"diffusion_steps": 2000, "sequence_len": 64}', "[]", "{"])
def test_settings_of_another_program_stay(
    text: str, go: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of the original are of no use without theirs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_args.json").write_text(text)
    before = files(tmp_path)
    go(status=1, steps=1)
    assert "training_args.json: expected the settings of a run of this program" in one_sentence(capsys.readouterr().err)
    assert files(tmp_path) == before


def test_leftover_tokenizer_of_a_run_that_died(go: Trained, trained: Path, tmp_path: Path) -> None:
    """In the folder of a new run on a file of one's own it is not trusted."""
    (tmp_path / "run").mkdir()
    other = train_word_level(["Not a word of the corpus"])
    (tmp_path / "run" / "word-level-vocab.json").write_text(other.to_json())
    folder = go(steps=1)
    assert contents(folder / "opt000001.pt")["tokenizer"] == contents(trained / "opt000006.pt")["tokenizer"]


def test_other_settings_may_change(go: Trained, copied: Path) -> None:
    """A value on the command line beats the saved one, and is saved in its turn."""
    go(
        **COPIED
        | {"steps": 9, "lr": 0.5, "warmup_steps": 0, "log_interval": 1, "microbatch": 4, "gradient_clipping": 0}
    )
    assert metrics(copied)[-1]["lr"] == pytest.approx(0.5 / 9)
    saved = json.loads((copied / "training_args.json").read_text())["train"]
    assert (saved["lr"], saved["microbatch"]) == (0.5, 4)
    assert train.main(flags(checkpoint_path=copied, steps=10)) == 0
    assert metrics(copied)[-1]["lr"] == pytest.approx(0.5 / 10)


def test_weight_decay_may_change(go: Trained, copied: Path, tmp_path: Path) -> None:
    shutil.copytree(copied, tmp_path / "other")
    go("run", **COPIED | {"steps": 8, "lr": 0.1})
    go("other", **COPIED | {"steps": 8, "lr": 0.1, "weight_decay": 0.5})
    assert not same(weights_of(tmp_path / "run", "*8.pt"), weights_of(tmp_path / "other", "*8.pt"))
