"""A sentence depends on the seed and its number alone; arguments are checked at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from untrained import L, T, build, final

from text_diffusion import generation
from text_diffusion.control import Length
from text_diffusion.errors import UserError
from text_diffusion.generation import TextDiffusion


@pytest.fixture(scope="module")
def writer() -> TextDiffusion:
    return build()


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


def test_many_edges_make_smaller_batches(writer: TextDiffusion) -> None:
    """What an automaton looks at is a number for each position and edge."""
    plan = writer.plan([Length(2, 3)])
    assert plan.accepting is not None
    assert writer.choose_batch_size(200, plan) == 200
    plan.accepting.emits = torch.zeros(generation.BATCH_MEMORY // (4 * L * 50), dtype=torch.long)
    assert writer.choose_batch_size(200, plan) == 50


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
