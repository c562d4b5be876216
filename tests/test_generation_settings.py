"""Steps, halting, lengths, truncated noise and clamping do what they say, and cost what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from untrained import L, T, build, final

from text_diffusion.generation import TextDiffusion, nearest_embedding
from text_diffusion.samplers import Step
from text_diffusion.sampling import Sampling
from text_diffusion.spacing import spaced_timesteps


@pytest.fixture(scope="module")
def writer() -> TextDiffusion:
    return build()


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
    def chosen(fills: bool = False, words: bool = False, **settings: Any) -> tuple[str, int | None]:
        how = Sampling(**settings).chosen(fills, words)
        return how.sampler, how.resample

    assert chosen(steps=20) == chosen(steps=40, churn=1.0) == ("dpm-solver++", None)
    assert chosen(steps=21) == chosen() == chosen(steps=4, top_p=0.9) == ("ancestral", None)
    assert chosen(steps=4, resample=2) == ("ancestral", 2)
    assert [chosen(True, steps=n) for n in (19, 20, 50)] == [("dpm-solver++", None), ("ancestral", 2), ("ancestral", 5)]
    assert chosen(True, steps=50, sampler="ddim") == ("ddim", None)
    assert chosen(True, steps=50, churn=1.0) == ("dpm-solver++", None)
    assert chosen(True, steps=50, resample=1) == ("ancestral", 1)
    of_words = [Sampling(steps=n).chosen(words=True) for n in (4, 20, 21, 50)]
    assert {how.sampler for how in of_words} == {"dpm-solver++"}
    assert [how.churn for how in of_words] == [None, None, 10.5, 25.0]
    assert Sampling(steps=30, churn=3.0).chosen(words=True).churn == 3.0
    assert chosen(True, True, steps=50) == ("ancestral", 5)
    assert chosen(words=True, steps=50, top_p=0.9) == ("ancestral", None)
    assert chosen(words=True, steps=50, resample=2) == ("ancestral", 2)


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


def test_gradients_go_through_clamping() -> None:
    """As if nothing were rounded, so that scores can be followed."""
    generator = torch.Generator().manual_seed(0)
    embeddings, x = torch.randn(40, 6, generator=generator), torch.randn(5, 6, generator=generator)
    followed = nearest_embedding(x.requires_grad_(), embeddings)
    torch.testing.assert_close(followed, nearest_embedding(x.detach(), embeddings))
    weights = torch.randn(5, 6, generator=generator)
    (gradient,) = torch.autograd.grad((weights * followed).sum(), x)
    assert torch.equal(gradient, weights)
