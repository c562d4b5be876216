"""A sentence depends on the seed and its number alone; clamping and truncation work; arguments are checked at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from text_diffusion import generation
from text_diffusion.config import ModelConfig
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import TextDiffusion, nearest_embedding
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.samplers import Step
from text_diffusion.sampling import Sampling
from text_diffusion.schedules import named_betas
from text_diffusion.timesteps import spaced_timesteps
from text_diffusion.tokenizer import train_word_level

T, L = 50, 8


def build(self_condition: bool = True, time_scale: float | None = None) -> TextDiffusion:
    """Random weights, scaled up so that the network says different words for different noise.

    With this seed no word of the first 40 sentences wins by less than 0.001, so that rounding errors change none.
    """
    lines = [f"The {a} {b} is {c}." for a in ("red", "blue", "old") for b in ("apple", "fig") for c in ("ripe", "cold")]
    tokenizer = train_word_level(lines)
    torch.manual_seed(27)
    config = ModelConfig(
        in_channel=6,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_channels=8,
        self_condition=self_condition,
    )
    model = TransformerNetModel(config, tokenizer.vocab_size, L)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name and name.endswith("weight"):
                parameter.mul_(3)
    return TextDiffusion(
        model.eval(), GaussianDiffusion(named_betas("sqrt", T), time_scale=time_scale), tokenizer, L, {}
    )


@pytest.fixture(scope="module")
def writer() -> TextDiffusion:
    return build()


def final(steps: Any) -> Tensor:
    return list[Step](steps)[-1].pred_xstart


# One seed, one sentence


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clamp": True},
        {"top_p": 0.7},
        {"sampler": "dpm-solver++", "churn": 4.0, "spacing": "log-snr"},
        {"sampler": "heun", "halt": 1},
    ],
    ids=str,
)
def test_sentences_are_the_same_in_any_batch(options: dict[str, Any], self_condition: bool) -> None:
    """Alone or among others, across the blocks of 32 that noise is drawn in, whatever the size of the batch."""
    writer = build(self_condition)
    sentences = writer.sample(40, steps=5, **options)
    assert len(sentences) == 40
    assert len(set(sentences)) > 20, "sentences must differ for this test to mean anything"
    for batch_size in (1, 7, 32, 33, 1000):
        assert writer.sample(40, steps=5, batch_size=batch_size, **options) == sentences
    assert writer.sample(3, steps=5, **options) == sentences[:3]


def test_predictions_are_the_same_in_any_batch(writer: TextDiffusion) -> None:
    """Before rounding too, to float32's last digits, at every step."""
    whole = list(writer.denoising(0, 40, steps=5))
    for start, stop in ((0, 1), (31, 32), (32, 33), (30, 35), (39, 40)):
        for step, part in zip(whole, writer.denoising(start, stop, steps=5), strict=True):
            torch.testing.assert_close(part.x_t, step.x_t[start:stop], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(part.pred_xstart, step.pred_xstart[start:stop], rtol=1e-4, atol=1e-4)


def test_seed_decides(writer: TextDiffusion) -> None:
    first = writer.sample(20, steps=5, seed=1)
    assert writer.sample(20, steps=5, seed=1) == first
    other = writer.sample(20, steps=5, seed=2)
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 3
    assert writer.sample(20, steps=5) == writer.sample(20, steps=5, seed=10_708)


def test_neither_side_s_random_numbers_matter_to_the_other(writer: TextDiffusion) -> None:
    torch.manual_seed(5)
    sentences = writer.sample(3, steps=5)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert writer.sample(3, steps=5) == sentences


def test_every_option_changes_something(writer: TextDiffusion) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"steps": 6},
        {"seed": 1},
        {"sequence_len": 6},
        {"top_p": 0.5},
        {"clamp": True},
        {"clamp": True, "clamp_start": 20},
        {"spacing": "log-snr"},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5},
        {"sampler": "ancestral"},
        {"sampler": "dpm-solver++", "churn": 2.0},
        {"sampler": "heun"},
        {"sampler": "heun", "churn": 8.0},
    ]
    results = {tuple(writer.sample(20, **{"steps": 5} | option)) for option in options}
    assert len(results) == len(options)


def test_no_sentences(writer: TextDiffusion) -> None:
    assert writer.sample(0, steps=5) == []


# Batches chosen by memory


def test_chosen_batch_fits_in_memory(writer: TextDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than was asked for, never none, and no more numbers at once than the limit."""
    sentences = writer.sample(10, steps=5)
    assert writer.choose_batch_size(10) == 10
    assert writer.choose_batch_size(0) == 1
    widest = 4 * 16 * L  # the feed-forward layer's numbers for a sentence, more than its logits (15 L)
    for room, size in ((3 * 4 * widest, 3), (4 * widest - 1, 1), (0, 1)):
        monkeypatch.setattr(generation, "BATCH_MEMORY", room)
        assert writer.choose_batch_size(10) == size
        assert writer.sample(10, steps=5) == sentences


# Steps


@pytest.mark.parametrize("steps", [1, 2, 7, T])
@pytest.mark.parametrize("time_scale", [None, 1.0])
def test_network_sees_the_kept_timesteps_of_training(steps: int, time_scale: float | None) -> None:
    """One call a step, at training timesteps on the scale of training; its own last prediction comes with it."""
    writer = build(time_scale=time_scale)
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
    writer.model.register_forward_pre_hook(lambda _, args: calls.append(args))
    walk = list(writer.denoising(0, 2, steps=steps, clamp=True))
    kept = spaced_timesteps(writer.diffusion.alphas_cumprod, steps)[::-1]
    assert [step.t for step in walk] == kept
    scale = 1000 / T if time_scale is None else time_scale
    assert [times.tolist() for _, times, _ in calls] == [pytest.approx([t * scale] * 2) for t in kept]
    assert all(seen is step.x_t for (seen, _, _), step in zip(calls, walk, strict=True))
    assert calls[0][2] is None
    assert all(call[2] is step.pred_xstart for call, step in zip(calls[1:], walk[:-1], strict=True))


def test_many_steps_are_ancestral_and_few_are_not() -> None:
    def chosen(fills: bool = False, **settings: Any) -> tuple[str, int | None]:
        how = Sampling(**settings).chosen(fills)
        return how.sampler, how.resample

    assert chosen(steps=20) == chosen(steps=40, churn=1.0) == ("dpm-solver++", None)
    assert chosen(steps=21) == chosen() == chosen(steps=4, top_p=0.9) == ("ancestral", None)
    assert chosen(steps=4, resample=2) == ("ancestral", 2)
    assert [chosen(True, steps=n) for n in (19, 20, 50)] == [("dpm-solver++", None), ("ancestral", 2), ("ancestral", 5)]
    assert chosen(True, steps=50, sampler="ddim") == ("ddim", None)
    assert chosen(True, steps=50, churn=1.0) == ("dpm-solver++", None)
    assert chosen(True, steps=50, resample=1) == ("ancestral", 1)


@pytest.mark.parametrize(
    ("sampler", "least", "again"),
    [
        ("ancestral", 1, {}),
        ("ancestral", 1, {"resample": 2}),
        ("ancestral", 1, {"resample": 3}),
        ("ddim", 1, {}),
        ("dpm-solver++", 1, {}),
        ("dpm-solver++", 1, {"churn": 3.0}),
        ("heun", 3, {}),
        ("heun", 3, {"churn": 3.0}),
    ],
)
def test_steps_are_network_calls(writer: TextDiffusion, sampler: str, least: int, again: dict[str, Any]) -> None:
    """Whatever the sampler, the spacing, the noise that is added again."""
    calls: list[int] = []
    handle = writer.model.register_forward_hook(lambda *_: calls.append(1))
    for steps in (least, 4, 5, T):
        calls.clear()
        walk = list(writer.denoising(0, 2, steps=steps, sampler=sampler, spacing="log-snr", **again))
        assert len(walk) == len(calls) == steps
        assert (walk[0].t, walk[-1].t) == (T - 1, 0 if steps > 1 else T - 1)
    handle.remove()


def test_spacing_by_loss_takes_the_measured_one(writer: TextDiffusion) -> None:
    """A loss that rises in the first fifth only puts most steps there."""
    measured = replace(writer, info={"loss_by_timestep": [float(min(part, 10)) for part in range(50)]})
    kept = [step.t for step in measured.denoising(0, 2, steps=11, spacing="loss")]
    assert sum(t <= 10 for t in kept) >= 9
    assert (kept[0], kept[-1]) == (T - 1, 0)


# Halting


@pytest.mark.parametrize("patience", [1, 2])
def test_halting_follows_the_words(writer: TextDiffusion, patience: int) -> None:
    """Against a walk over all calls: a sentence keeps the words that first stood for `patience` calls in a row."""
    steps, n = T, 40

    def words(walk: Any) -> Tensor:
        return torch.stack([writer.model.get_logits(step.pred_xstart).argmax(dim=-1) for step in walk])

    free, bound = (words(writer.denoising(0, n, steps=steps, seed=3, halt=halt)) for halt in (None, patience))
    halted = 0
    for i in range(n):
        same = [bool(torch.equal(a[i], b[i])) for a, b in pairwise(free)]
        runs = [k for k in range(patience, steps) if all(same[k - patience : k])]
        end = runs[0] if runs else steps - 1
        halted += end < steps - 1
        assert torch.equal(bound[: end + 1, i], free[: end + 1, i])
        assert torch.equal(bound[-1, i], free[end, i])
    assert halted > 5, "sentences must halt for this test to mean anything"


def test_halted_sentences_cost_nothing(writer: TextDiffusion) -> None:
    sizes: list[int] = []
    handle = writer.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    list(writer.denoising(0, 40, steps=30, seed=3, halt=1))
    handle.remove()
    assert sizes[0] == 40
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) < 0.8 * 30 * 40


def test_sequence_len(writer: TextDiffusion) -> None:
    assert final(writer.denoising(0, 2, steps=2)).shape == (2, L, 6)
    for length in (3, 5, L):
        assert final(writer.denoising(0, 2, steps=2, sequence_len=length)).shape == (2, length, 6)


def noises(writer: TextDiffusion, walk: list[Step]) -> list[Tensor]:
    """The noise that each x_t but the first was made with: x_t less the mean of p, over its std."""
    process = writer.diffusion.respace(spaced_timesteps(writer.diffusion.alphas_cumprod, len(walk)))
    found = []
    for s, (before, after) in zip(reversed(range(len(walk))), pairwise(walk), strict=False):
        p = process.p_mean_variance(before.pred_xstart, before.x_t, torch.full((len(before.x_t),), s))
        found.append((after.x_t - p.mean) / p.variance.sqrt())
    return found


def test_noise_of_every_step_is_normal_and_new(writer: TextDiffusion) -> None:
    """Mean 0, variance 1, no correlation between steps: bounds of five standard errors, false alarm 6e-7 each."""
    walk = list(writer.denoising(0, 500, steps=5, sampler="ancestral"))
    drawn = [walk[0].x_t, *noises(writer, walk)]
    n = walk[0].x_t.numel()
    for i, z in enumerate(drawn):
        assert abs(float(z.mean())) < 5 / math.sqrt(n)
        assert float(z.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / n))
        for other in drawn[:i]:
            assert abs(float((z * other).mean())) < 5 / math.sqrt(n)


@pytest.mark.parametrize(("top_p", "variance"), [(0.5, 0.0801), (0.9, 0.2399), (2.0, 0.7737)])
def test_top_p_truncates_the_noise_of_each_step(writer: TextDiffusion, top_p: float, variance: float) -> None:
    """x_t varies less, by what is known of the truncated normal; where sampling starts is not truncated."""
    full, walk = (list(writer.denoising(0, 500, steps=5, sampler="ancestral", top_p=limit)) for limit in (None, top_p))
    assert torch.equal(full[0].x_t, walk[0].x_t)
    for z in noises(writer, walk):
        assert float(z.abs().max()) < top_p + 1e-3
        assert float(z.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / z.numel()))
    assert all(float(b.x_t.var()) < float(a.x_t.var()) for a, b in zip(full[1:2], walk[1:2], strict=True))


# Clamping


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
def test_nearest_embedding_by_brute_force(shape: tuple[int, ...]) -> None:
    """All distances in float64; the embeddings have many lengths, so that the nearest is not the best aligned."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(40, 6, generator=generator) * torch.rand(40, 1, generator=generator) * 5
    x = 2 * torch.randn(*shape, 6, generator=generator)
    found = nearest_embedding(x, embeddings)
    table = embeddings.double().numpy()
    differences = x.double().numpy()[..., None, :] - table
    expected = np.linalg.norm(differences, axis=-1).argmin(axis=-1)
    assert found.shape == x.shape
    np.testing.assert_array_equal(found.double().numpy(), table[expected])


def test_nearest_embedding_of_an_embedding_is_itself() -> None:
    embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest_embedding(embeddings, embeddings), embeddings)


def clamped(writer: TextDiffusion, step: Step) -> list[bool]:
    """Which predictions are rows of the embedding matrix, to the last bit."""
    rows = {tuple(row) for row in writer.model.word_embedding.weight.tolist()}
    return [tuple(entry) in rows for entry in step.pred_xstart.flatten(0, 1).tolist()]


@pytest.mark.parametrize(("clamp_start", "last"), [(None, T), (T, T), (49, 37), (25, 24), (24, 12), (1, 0)])
def test_clamped_predictions_are_words(writer: TextDiffusion, clamp_start: int | None, last: int) -> None:
    """At every step, or below clamp_start: kept are 49, 37, 24, 12, 0."""
    walk = list(writer.denoising(0, 3, steps=5, clamp=True, clamp_start=clamp_start))
    assert [step.t for step in walk] == [49, 37, 24, 12, 0]
    for step in walk:
        assert all(clamped(writer, step)) == (step.t <= last)
        assert any(clamped(writer, step)) == (step.t <= last)


def test_clamping_takes_the_nearest_word(writer: TextDiffusion) -> None:
    """The first prediction is the unclamped one, rounded."""
    free, bound = (next(iter(writer.denoising(0, 3, steps=5, clamp=clamp))) for clamp in (False, True))
    assert not any(clamped(writer, free))
    assert torch.equal(bound.pred_xstart, nearest_embedding(free.pred_xstart, writer.model.word_embedding.weight))


# Text


def test_decoding(writer: TextDiffusion) -> None:
    """The best word of each position by the tied head, special tokens left out, up to the first [SEP] or all of it."""
    x = final(writer.denoising(0, 50, steps=5))
    weight, bias = writer.model.word_embedding.weight.detach(), writer.model.lm_head.bias.detach()
    word = {i: token for token, i in writer.tokenizer.backend.get_vocab().items()}
    tokens = [[word[i] for i in row] for row in (x @ weight.T + bias).argmax(dim=-1).tolist()]
    assert any("[SEP]" in row for row in tokens)

    def text(row: list[str]) -> str:
        return "".join(token for token in row if not token.startswith("[")).replace("Ġ", " ").removeprefix(" ")

    cut = [row[: row.index("[SEP]")] if "[SEP]" in row else row for row in tokens]
    assert writer.decode(x) == [text(row) for row in cut] == writer.sample(50, steps=5)
    assert writer.decode(x, whole=True) == [text(row) for row in tokens] != writer.decode(x)


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "between 1 and 50, .* found 0"),
        ({"steps": -3}, "between 1 and 50, .* found -3"),
        ({"steps": T + 1}, "between 1 and 50, .* found 51"),
        ({"sequence_len": 2}, "between 3 and 8, .* found 2"),
        ({"sequence_len": -1}, "between 3 and 8, .* found -1"),
        ({"sequence_len": L + 1}, "between 3 and 8, .* found 9"),
        ({"top_p": 0}, "above 0 .*found 0"),
        ({"top_p": -0.5}, "above 0 .*found -0.5"),
        ({"clamp_start": 20}, "expects clamp to be on"),
        ({"clamp_start": 0, "clamp": True}, "between 1 and 50, found 0"),
        ({"batch_size": -1}, "at least 1, found -1"),
        ({"sampler": "euler"}, "one of auto, ancestral, ddim, .*found 'euler'"),
        ({"eta": 0.5}, "belongs to the sampler ddim"),
        ({"eta": 1.5, "sampler": "ddim"}, "between 0 and 1, found 1.5"),
        ({"top_p": 0.9, "sampler": "heun"}, "heun adds none without eta or churn"),
        ({"top_p": 0.9, "sampler": "ddim"}, "ddim adds none without eta or churn"),
        ({"churn": 1.0, "sampler": "ddim"}, "belongs to the samplers dpm-solver.* found 1 with ddim"),
        ({"resample": 2, "sampler": "ddim"}, "resample belongs to the sampler ancestral .* found 2 with ddim"),
        ({"resample": 0}, "must be at least 1 call a level, found 0"),
        ({"resample": 2, "churn": 1.0}, "churn belongs to .* found 1 with ancestral"),
        ({"churn": -1.0, "sampler": "heun"}, "above 0, found -1 with heun"),
        ({"sampler": "heun", "steps": 2}, "needs at least 3 STEPS .* found 2"),
        ({"sampler": "heun", "steps": T + 1}, "between 1 and 50, .* found 51"),
        ({"spacing": "even"}, "one of auto, loss, uniform, log-snr, found 'even'"),
        ({"spacing": "loss"}, "expects weights that carry their loss"),
        ({"halt": 0}, "at least 1 call, found 0"),
    ],
)
def test_bad_arguments_are_found_at_once(writer: TextDiffusion, options: dict[str, Any], message: str) -> None:
    """When `denoising` is called, not when its first step is taken; in one sentence for the user."""
    calls: list[Callable[..., object]] = [lambda **o: writer.sample(1, **o)]
    if "batch_size" not in options:
        calls.append(lambda **o: writer.denoising(0, 1, **o))
    for call in calls:
        with pytest.raises(UserError, match=message) as caught:
            call(**options)
        assert isinstance(caught.value, ValueError)


def test_bad_number_of_samples(writer: TextDiffusion) -> None:
    with pytest.raises(UserError, match="found -1"):
        writer.sample(-1)


# What the caller keeps


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_caller_keeps_its_modes(enabled: bool, training: bool) -> None:
    """Grad mode and the model's mode are the caller's own between the steps, after them, and after leaving early."""
    writer = build()
    writer.model.train(training)
    with torch.set_grad_enabled(enabled):
        walk = writer.denoising(0, 2, steps=5)
        assert torch.is_grad_enabled() is enabled
        for i, step in enumerate(walk):
            assert torch.is_grad_enabled() is enabled
            assert writer.model.training is training
            assert not step.x_t.requires_grad
            assert not step.pred_xstart.requires_grad
            if i == 2:
                break
        del walk
        writer.sample(2, steps=3)
        assert torch.is_grad_enabled() is enabled
        assert writer.model.training is training
        assert all(parameter.requires_grad for parameter in writer.model.parameters())


def test_steps_come_one_at_a_time(writer: TextDiffusion) -> None:
    calls: list[int] = []
    handle = writer.model.register_forward_hook(lambda *_: calls.append(1))
    walk = writer.denoising(0, 1, steps=5)
    assert calls == []
    next(walk)
    assert calls == [1]
    handle.remove()
