"""A student: what it learns from, what it can do after it, how such a run goes on, and what is refused."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import LINES, SIZES, Trained, everything, flags, one_sentence, same, stop_at, write_text

from text_diffusion import likelihood, train
from text_diffusion.condition import NONE
from text_diffusion.cross_entropy import evidence
from text_diffusion.data import fit
from text_diffusion.distillation import LEAST_EVIDENCE, Teacher, find
from text_diffusion.generation import load_diffusion
from text_diffusion.loss_by_timestep import loss_curve
from text_diffusion.randomness import Stream
from text_diffusion.run import prepare
from text_diffusion.samplers import dpm_solver, invert
from text_diffusion.sampling import Sampling
from text_diffusion.schedules import log_snr_at
from text_diffusion.spacing import spaced_timesteps
from text_diffusion.step import examples, noise_of
from text_diffusion.validation import validate

SHIPPED = Path(__file__).resolve().parents[1] / "ckpts/simple-cross-entropy/ema_0.9999_010000.pt"
OF_WORDS: dict[str, Any] = {"objective": "cross_entropy", "diffusion_steps": None}
FEW: dict[str, Any] = {"pairs": 70, "teacher_levels": 3, "batch_size": 16}
CPU = torch.device("cpu")
NOT_GIVEN = dict.fromkeys(("hidden_size", "num_layers", "num_heads", "in_channel", "num_channels"))


@pytest.fixture(scope="module")
def teacher_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(corpus, tmp_path_factory.mktemp("teachers") / "teacher", steps=150, hidden_size=32, lr=1e-2)


def teach(text: Path, folder: Path, **options: Any) -> Path:
    """A trained teacher's weights."""
    assert train.main(toy_flags(text, folder, **OF_WORDS | {"warmup_steps": 0} | options)) == 0
    return next(folder.glob("ema_0.9_*.pt"))


def found(weights: Path) -> Teacher:
    teacher = find({"teacher": str(weights)}, {})
    assert teacher is not None
    return teacher


def toy_flags(text: Path, folder: Path, **options: Any) -> list[str]:
    """Flags of a toy run; what is None is not given."""
    given = {"dataset": text, "checkpoint_path": folder, **SIZES, **options}
    return flags(**{name: value for name, value in given.items() if value is not None})


def student_flags(text: Path, folder: Path, teacher: Path, **options: Any) -> list[str]:
    return toy_flags(text, folder, teacher=teacher, **NOT_GIVEN, diffusion_steps=None, **FEW | options)


# What it learns from


def test_noise_is_what_the_flow_makes_the_sentence_of(teacher_run: Path) -> None:
    """Followed back and down again, by other steps, nearly all sentences return; what is left of chance is normal."""
    teacher = found(teacher_run)
    writer = load_diffusion(teacher_run, device="cpu")
    lines = [LINES[i % len(LINES)] for i in range(160)]
    ids = fit(writer.tokenizer.encode(lines), writer.sequence_len, writer.tokenizer, "error", "lines")
    noise = teacher.follow_back(ids, None, (5, Stream.PAIRS), 30, CPU)
    model, process = writer.model, writer.diffusion.respace(spaced_timesteps(writer.diffusion.alphas_cumprod, 200))

    def denoise(x_t: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        at = process.network_time(t)
        x_0: Tensor = model(x_t, at, model(x_t, at))
        return x_0

    def written(noise: Tensor) -> Tensor:
        with torch.no_grad():
            last = [*dpm_solver(denoise, process, lambda s: noise)][-1].pred_xstart
        return model.get_logits(last).argmax(dim=-1)

    assert (written(noise) == ids).all(dim=1).float().mean() > 0.8
    assert (written(noise.roll(1, 0)) == ids).all(dim=1).float().mean() < 0.2
    n = noise.numel()
    assert float(noise.mean()) == pytest.approx(0, abs=4 / math.sqrt(n))
    assert float(noise.var()) == pytest.approx(1, abs=0.04)
    again = teacher.follow_back(ids, None, (5, Stream.PAIRS), 30, CPU)
    other = teacher.follow_back(ids, None, (6, Stream.PAIRS), 30, CPU)
    assert torch.equal(again, noise)
    assert float((other - noise).abs().mean()) > 0.5


def test_training_meets_the_noise_of_its_sentences(corpus: Path, tmp_path: Path, teacher_run: Path) -> None:
    """That of the text's sentences in turn and round again, and of the held-out ones."""
    options = {"steps": 3, "pairs": 100, "val_txt_path": write_text(tmp_path / "held-out.txt", LINES[:5])}
    run, _ = prepare(train.parse(student_flags(corpus, tmp_path / "run", teacher_run, **options)))
    assert run.lock is not None
    run.lock.release()
    lines = corpus.read_text(encoding="utf-8").splitlines()
    taught = [run.tokenizer.decode(ids) for ids in run.batches.ids.tolist()]
    assert len(taught) == 100 > len(lines) == 80
    assert sorted(taught[:80]) == sorted(lines)
    assert set(taught[80:]) <= set(lines)
    assert taught[80:] != taught[:20]
    teacher, noises = found(teacher_run), run.batches.noises
    assert noises is not None
    assert torch.equal(noises, teacher.follow_back(run.batches.ids, None, (run.config.seed, Stream.PAIRS, 1), 3, CPU))
    rows = {tuple(noise.flatten().tolist()): ids for noise, ids in zip(noises, run.batches.ids, strict=True)}
    assert len(rows) == 100
    met = run.batches.batch(2), noise_of(run, 2, slice(0, 16)).t
    for ids, noise in zip(*met, strict=True):
        assert torch.equal(ids, rows[tuple(noise.flatten().tolist())])
    assert torch.equal(noise_of(run, 2, slice(4, 7)).t, met[1][4:7])
    assert run.held_out is not None
    assert run.held_out_noise is not None
    assert len(run.held_out) == 5
    expected = teacher.follow_back(run.held_out, None, (run.config.seed, Stream.PAIRS, 2), 3, CPU)
    assert torch.equal(run.held_out_noise, expected)
    config = run.model_config
    assert (config.objective, config.known_words, config.least_evidence) == ("cross_entropy", False, LEAST_EVIDENCE)
    assert (run.config.lr, config.hidden_size) == (2e-3, 32)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_pairs(
    wanted: bool, corpus: Path, tmp_path: Path, teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --deterministic True the teacher computes by deterministic kernels too."""
    seen = []
    original = Teacher.follow_back

    def follow_back(*given: Any) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(*given)

    monkeypatch.setattr(Teacher, "follow_back", follow_back)
    run, _ = prepare(train.parse(student_flags(corpus, tmp_path / "student", teacher_run, deterministic=wanted)))
    assert run.lock
    run.lock.release()
    assert set(seen) == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()


def test_least_evidence() -> None:
    """Below the level where alpha / sigma^2 is that much, noise counts as there; above, as it did."""
    x, t = torch.randn(5, 3, 2), torch.tensor([0.0, 300.0, 600.0, 700.0, 1000.0])
    lam = log_snr_at(t).double()
    factor = lam.sigmoid().sqrt() / (-lam).sigmoid()
    expected = x * torch.maximum(factor, torch.tensor(0.25)).float()[:, None, None]
    assert evidence(x, t, least=0.25).numpy() == pytest.approx(expected.numpy(), rel=1e-4)
    assert factor[3] < 0.25 < factor[1]


def test_labels_go_with_the_pairs(tmp_path: Path) -> None:
    """The teacher is told a sentence's label, and so is the student: where it was dropped, both were told nothing."""
    text = write_text(tmp_path / "toy.tsv", [f"{line}\t{line.split()[1]}" for line in LINES])
    weights = teach(text, tmp_path / "teacher", condition="labels", steps=30, drop_condition=0.4)
    options = {"condition": "labels", "pairs": 100, "val_txt_path": text, "steps": 2, "microbatch": 0}
    run, state = prepare(train.parse(student_flags(text, tmp_path / "run", weights, **options)))
    assert run.lock
    run.lock.release()
    labels, ids, noises = run.batches.conditions, run.batches.ids, run.batches.noises
    assert labels is not None
    assert noises is not None
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        assert label == NONE or run.tokenizer.decode(row).split()[1] == run.labels[label]
    assert 20 < int((labels == NONE).sum()) < 60
    teacher = found(weights)
    for told, same_noise in ((labels, True), (labels.roll(1), False), (None, False)):
        noise = teacher.follow_back(ids, told, (run.config.seed, Stream.PAIRS, 1), 3, CPU)
        assert torch.equal(noise, noises) == same_noise
    by_noise = {tuple(noise.flatten().tolist()): label for noise, label in zip(noises, labels.tolist(), strict=True)}
    _, _, _, met = examples(run, state, slice(0, 16))
    assert met is not None
    assert met.tolist() == [by_noise[tuple(noise.flatten().tolist())] for noise in noise_of(run, 0, slice(0, 16)).t]
    assert run.held_out is not None
    assert run.held_out_given is not None
    assert run.held_out_noise is not None
    key = (run.config.seed, Stream.PAIRS, 2)
    for told, same_noise in ((run.held_out_given, True), (run.held_out_given.roll(1), False)):
        assert torch.equal(teacher.follow_back(run.held_out, told, key, 3, CPU), run.held_out_noise) == same_noise


def test_sources_go_with_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher is told a sentence's source, of the length that it was trained with."""
    text = write_text(tmp_path / "toy.tsv", [f"{line.split()[1]}\t{line}" for line in LINES])
    options = {"condition": "source", "val_txt_path": text, "steps": 2, "drop_condition": 0.5}
    weights = teach(text, tmp_path / "teacher", **options, source_len=5)
    assert train.main(student_flags(text, tmp_path / "refused", weights, **options, source_len=4)) == 1
    assert "--source_len must be 5, as the teacher's is, found 4" in one_sentence(capsys.readouterr().err)
    flags = student_flags(text, tmp_path / "run", weights, **options, pairs=40, eval_interval=1)
    run, _ = prepare(train.parse(flags))
    assert run.lock
    run.lock.release()
    ids, given, noises = run.batches.ids, run.batches.conditions, run.batches.noises
    assert given is not None
    assert given.shape == (40, 5)
    for row, source in zip(ids.tolist(), given.tolist(), strict=True):
        assert source[0] == NONE or run.tokenizer.decode(source) == run.tokenizer.decode(row).split()[1]
    assert noises is not None
    key = (run.config.seed, Stream.PAIRS, 1)
    teacher = found(weights)
    for told, same_noise in ((given, True), (given.roll(1, 0), False)):
        assert torch.equal(teacher.follow_back(ids, told, key, 3, CPU), noises) == same_noise
    assert train.main(flags) == 0


def test_without_self_conditioning_or_held_out_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text of one sentence has none to hold out; its student learns many noises of it, few of them alike."""
    text = write_text(tmp_path / "one.txt", LINES[:1] * 3)
    weights = teach(text, tmp_path / "teacher", self_condition=False, steps=20)
    run, _ = prepare(train.parse(student_flags(text, tmp_path / "run", weights, steps=2)))
    assert run.lock
    run.lock.release()
    assert run.held_out_noise is None
    assert run.batches.noises is not None
    assert len(set(map(tuple, run.batches.ids.tolist()))) == 1
    assert len({round(float(noise[0, 0]), 3) for noise in run.batches.noises}) > 60
    assert "Traceback" not in capsys.readouterr().err


def test_out_of_memory_on_the_way_back(
    teacher_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same noise in smaller batches, with a warning; the bar of a long one does not mind."""
    teacher = found(teacher_run)
    ids = fit(teacher.writer.tokenizer.encode(LINES[:40]), 8, teacher.writer.tokenizer, "error", "lines")
    whole = teacher.follow_back(ids, None, (5, Stream.PAIRS), 3, CPU)

    def short(denoise: Any, process: Any, x_0: Tensor) -> Tensor:
        if len(x_0) > 20:
            raise MemoryError
        return invert(denoise, process, x_0)

    monkeypatch.setattr("text_diffusion.distillation.invert", short)
    monkeypatch.setattr("text_diffusion.distillation.SAY_EVERY", -1.0)
    parts = teacher.follow_back(ids, None, (5, Stream.PAIRS), 3, CPU)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().err
    assert "warning: out of memory with 40 sentences at once; going on with 20" in said
    assert "50% followed" in said


# What it can do


def test_one_call_is_enough(tmp_path: Path) -> None:
    """Of the shipped teacher; by itself it has only one thing to say in one call."""
    options = {"teacher": SHIPPED, "checkpoint_path": tmp_path, "pairs": 1500, "teacher_levels": 6, "steps": 120}
    assert train.main(flags(**options, batch_size=64, eval_interval=0)) == 0
    teacher, student = (load_diffusion(path, device="cpu") for path in (SHIPPED, tmp_path / "ema_0.9999_000120.pt"))
    assert student.is_student
    assert not teacher.is_student
    assert not replace(teacher, model=student.model).is_student, "not by its settings, which any run may have"
    before, after = (writer.sample(200, steps=1) for writer in (teacher, student))
    assert len(set(before)) < 10
    assert len(set(after)) > 140
    known = set((SHIPPED.parents[2] / "data/simple-train.txt").read_text(encoding="utf-8").splitlines())
    words = {word for line in known for word in line.split()}
    right = [line for line in after if len(line.split()) == 5 and set(line.split()) <= words]
    assert len(right) > 170
    lines = (SHIPPED.parents[2] / "data/simple-test.txt").read_text(encoding="utf-8").splitlines()[:200]
    ids = fit(student.tokenizer.encode(lines), student.sequence_len, student.tokenizer, "error", "lines")
    noise = found(SHIPPED).follow_back(ids, None, (1, Stream.PAIRS), 6, CPU)
    time = student.diffusion.network_time(torch.full((200,), student.diffusion.num_timesteps - 1))
    said = student.model.get_logits(student.model(noise, time)).argmax(dim=-1)
    slots = ids[:, [2, 3, 5]], said[:, [2, 3, 5]]  # colour, food, state
    right_words, by_chance = ((slots[0] == words).float().mean() for words in (slots[1], slots[1].roll(1, 0)))
    assert by_chance < 0.1
    assert right_words > 0.25
    own, other = (validate(student.model, student.diffusion, ids, noises=n) for n in (noise, None))
    assert own["val_loss"] < other["val_loss"]


def test_its_walk_draws_no_noise() -> None:
    """Whatever the number of steps, unless something that is asked for needs noise."""
    chosen = [Sampling(steps=n).chosen(fills, student=True).sampler for n in (1, 50) for fills in (False, True)]
    assert set(chosen) == {"dpm-solver++"}
    assert Sampling(steps=4, top_p=0.9).chosen(student=True).sampler == "ancestral"
    assert Sampling(steps=40, resample=2).chosen(student=True).sampler == "ancestral"


def test_calls_of_a_model_of_words_close_up() -> None:
    """By how much goes by the nats of a sentence, as long as it is to be."""
    model = load_diffusion(SHIPPED, device="cpu")
    abar, T = model.diffusion.alphas_cumprod, model.diffusion.num_timesteps
    loss = loss_curve(model.info["loss_by_timestep"], T)
    for length in (7, 5):
        expected = spaced_timesteps(abar, 3, loss=loss, closing=1 + 3 / (length * loss[-1]))
        assert [step.t for step in model.denoising(0, 2, steps=3, sequence_len=length)] == expected[::-1]
        assert expected != spaced_timesteps(abar, 3, loss=loss)


# How it goes on


def test_stopped_and_gone_on(
    corpus: Path, tmp_path: Path, teacher_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit as if it had never stopped, without --teacher too; its own folder, if none is named."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(student_flags(corpus, whole, teacher_run, steps=6, eval_interval=3)) == 0
    given = student_flags(corpus, parts, teacher_run, steps=6, eval_interval=3)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(4, patch)
        assert train.main(given) == 130
    at = given.index("--teacher")
    assert train.main(given[:at] + given[at + 2 :]) == 0
    assert same(everything(parts, 6), everything(whole, 6))
    assert not same(everything(whole, 6)["weights"], everything(teacher_run.parent, 150)["weights"])
    capsys.readouterr()
    assert likelihood.main([str(whole / "ema_0.9_000006.pt"), str(corpus), "--lines", "2", "--steps", "4"]) == 0
    assert "its teacher knows more" in capsys.readouterr().err


def test_another_teacher(corpus: Path, tmp_path: Path, teacher_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    copy = tmp_path / "copy.pt"
    shutil.copy(teacher_run, copy)
    assert train.main(student_flags(corpus, folder, copy, steps=2)) == 0
    capsys.readouterr()
    other = teach(corpus, tmp_path / "other", steps=2)
    assert train.main(student_flags(corpus, folder, other, steps=4)) == 1
    assert f"--teacher must be the weights that the run in {folder} was started with, found {other}" in one_sentence(
        capsys.readouterr().err
    )
    assert train.main(student_flags(corpus, folder, teacher_run, steps=3)) == 0  # the same, elsewhere
    capsys.readouterr()
    copy.unlink()
    given = student_flags(corpus, folder, teacher_run, steps=4)
    at = given.index("--teacher")
    assert train.main(given[:at] + given[at + 2 :]) == 0  # where it was said to be last


# What is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"known_words": True}, "--known_words must be False for a student, found True"),
        ({"hidden_size": 64}, "--hidden_size must be 32, as the teacher's is, found 64; leave it out"),
        ({"objective": "diffusion_lm"}, "--objective must be 'cross_entropy', as the teacher's is"),
        ({"sequence_len": 9}, "--sequence_len must be 8, as the teacher's is, found 9"),
        ({"teacher_levels": 10_001}, "--teacher_levels must be at most 10000, as many as the teacher has, found 10001"),
        ({"pairs": 1}, "--pairs must be at least 2, found 1"),
        ({"teacher_levels": 2}, "--teacher_levels must be at least 3, found 2"),
        ({"teacher": "none.pt"}, "none.pt: expected a checkpoint"),
    ],
)
def test_refused(
    options: dict[str, Any],
    expected: str,
    corpus: Path,
    tmp_path: Path,
    teacher_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"teacher": teacher_run, **NOT_GIVEN, "diffusion_steps": None, **FEW, **options}
    assert train.main(toy_flags(corpus, tmp_path / "run", steps=2, **given)) == 1
    assert expected in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["diffusion_lm", "masked", "autoregressive"])
def test_teachers_of_other_objectives(
    objective: str, go: Trained, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = {} if objective == "diffusion_lm" else {"diffusion_steps": None, "num_channels": None}
    folder = tmp_path / "other"
    assert train.main(toy_flags(corpus, folder, objective=objective, steps=1, **process)) == 0
    capsys.readouterr()
    assert train.main(student_flags(corpus, tmp_path / "run", folder / "ema_0.9_000001.pt", steps=2)) == 1
    expected = f"expected a teacher of --objective cross_entropy, found one of {objective}"
    assert expected in one_sentence(capsys.readouterr().err)


def test_pairs_expect_a_teacher(go: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    go(status=1, steps=2, pairs=10)
    assert "--pairs is about what a student learns, so it expects --teacher WEIGHTS" in one_sentence(
        capsys.readouterr().err
    )
