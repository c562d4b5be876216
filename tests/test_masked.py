"""The baseline that uncovers words: its bound and its sampling against enumeration, and its commands."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import LINES, everything, flags, same, stop_at, write_text

import text_diffusion
from text_diffusion import likelihood, sample, train
from text_diffusion.config import ModelConfig
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise
from text_diffusion.masked import HIDDEN, Masked, MaskedTransformer, bound, masked_loss, mean_bound
from text_diffusion.schedules import named_betas
from text_diffusion.tokenizer import train_word_level

V, L = 4, 3
SMALL: dict[str, Any] = {"in_channel": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
RUN: dict[str, Any] = SMALL | {"objective": "masked", "batch_size": 32, "ema_rate": 0.9, "eval_interval": 0}
CPU = torch.device("cpu")


def network(vocab_size: int = V) -> MaskedTransformer:
    """Random weights, far from the start's near zero."""
    torch.manual_seed(0)
    model = MaskedTransformer(ModelConfig(**SMALL), vocab_size, L).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.6)
    return model


def every_sentence(vocab_size: int = V) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocab_size), repeat=L)))


def every_mask() -> Tensor:
    return torch.tensor(list(itertools.product((False, True), repeat=L)))


def test_hidden_words_are_not_seen_and_all_others_are() -> None:
    model, ids = network(), torch.tensor([[1, 3, 2]])
    hidden = ids.masked_fill(torch.tensor([False, True, False]), HIDDEN)
    other = torch.tensor([[1, 0, 2]]).masked_fill(torch.tensor([False, True, False]), HIDDEN)
    assert torch.equal(model(hidden), model(other))
    for position in (0, 2):  # before and after
        changed = hidden.clone()
        changed[0, position] = (ids[0, position] + 1) % V
        assert not torch.allclose(model(changed)[:, 1], model(hidden)[:, 1], atol=1e-3)


def test_the_mean_of_the_loss_is_that_of_all_masks() -> None:
    """E over t and masks of the loss, by the exact sum over masks for each of T times, against 40,000 draws."""
    model, T, w = network(), 8, torch.tensor([[1, 3, 2]])
    process = GaussianDiffusion(named_betas("sqrt", T))
    masks, expected = every_mask(), 0.0
    for step in range(T):
        time = (step + 1) / T
        p = time ** masks.sum(dim=1) * (1 - time) ** (~masks).sum(dim=1)
        each = bound(model, w.expand(len(masks), L), masks, torch.full((len(masks),), time))
        expected += float((p * each).sum()) / T / L
    N = 40_000
    noise = Noise(torch.randn(N, L, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(N, L, 4))
    terms = masked_loss(model, process, w.expand(N, L), torch.arange(N) % T, noise)
    error = float(terms.nll.std()) / math.sqrt(N)
    assert abs(float(terms.nll.mean()) - expected) < 5 * error
    assert float(terms.total(torch.full((N,), 2.0)).mean()) == pytest.approx(2 * float(terms.nll.mean()))


def walked(model: MaskedTransformer, steps: int) -> Tensor:
    """P(w) of every sentence under eq. (3) in so many steps, by summing over all that may be shown at each, (V^L,)."""
    states: dict[tuple[int, ...], float] = {(HIDDEN,) * L: 1.0}
    for step in range(steps):
        show = 1 / (steps - step)
        after: dict[tuple[int, ...], float] = {}
        for state, p in states.items():
            words = model(torch.tensor([state])).softmax(dim=-1)[0]
            choices = [
                [(v, show * float(words[place, v])) for v in range(len(words[place]))] + [(HIDDEN, 1 - show)]
                if state[place] == HIDDEN
                else [(state[place], 1.0)]
                for place in range(L)
            ]
            for combination in itertools.product(*choices):
                key, chance = tuple(v for v, _ in combination), p * math.prod(c for _, c in combination)
                after[key] = after.get(key, 0.0) + chance
        states = after
    return torch.tensor([states.get(tuple(w), 0.0) for w in every_sentence(model.lm_head.out_features).tolist()])


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_follow_the_walk(steps: int) -> None:
    """Pearson's statistic of 8,000 samples; a false alarm once in 10^5."""
    tokenizer = train_word_level(["a"])
    model = network(tokenizer.vocab_size)
    writer, N, size = Masked(model, tokenizer, L, CPU), 8000, tokenizer.vocab_size
    ids = writer._ids(steps, 1, 0, N)
    assert int(ids.min()) >= 0, "all words are shown in the end"
    expected = N * walked(model, steps)
    assert float(expected.sum()) == pytest.approx(N, rel=1e-4)
    seen = torch.bincount((ids * torch.tensor([size**2, size, 1])).sum(dim=1), minlength=size**L)
    often = expected >= 5
    chi = float(((seen - expected)[often] ** 2 / expected[often]).sum())
    freedom = int(often.sum())
    assert freedom > 10
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
    assert torch.equal(writer._ids(steps, 1, 100, 140), ids[100:140])  # whatever else is sampled


def test_the_bound_is_one() -> None:
    """e^-bound of all sentences sum to no more than one, and none is above what the walk of many steps says."""
    model, sentences, T = network(), every_sentence(), 256
    bits = torch.zeros(len(sentences))
    for step, mask in itertools.product(range(T), every_mask()):
        time, hidden = (step + 0.5) / T, int(mask.sum())
        p = time**hidden * (1 - time) ** (L - hidden)
        masks, times = mask.expand(len(sentences), L), torch.full((len(sentences),), time)
        bits += p * bound(model, sentences, masks, times) / T
    assert float((-bits).exp().sum()) <= 1
    assert ((-bits).exp() <= walked(model, 12) + 1e-3).all()


def test_the_bound_of_a_batch_is_that_of_its_sentences() -> None:
    model, sentences, batches = network(), every_sentence()[:20], []
    model.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    whole, parts = (mean_bound(model, sentences, 3, 0, size) for size in (20, 7))
    torch.testing.assert_close(parts, whole)
    assert batches == [20] * 3 + [7, 7, 6] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a run of 400 steps."""
    where = tmp_path_factory.mktemp("masked")
    write_text(where / "toy.txt", LINES)
    options = {"steps": 400, "lr": 1e-2, "eval_interval": 200, "hidden_size": 32}
    assert train.main(flags(dataset=where / "toy.txt", checkpoint_path=where / "run", **RUN | options)) == 0
    return where


def test_the_same_loop_trains_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training lines, all equally likely, cost hardly more than log2 of their number; samples are mostly lines."""
    run = folder / "run"
    lines = (run / "toy-train.txt").read_text(encoding="utf-8").splitlines()
    weights, figures = str(run / "ema_0.9_000400.pt"), run / "bits.json"
    assert likelihood.main([weights, str(run / "toy-train.txt"), "--paths", "8", "--json", str(figures)]) == 0
    out = capsys.readouterr().out
    assert "bound" in out
    assert "walk" not in out
    bits = json.loads(figures.read_text())["means"]["bound"]["bits_per_sentence"]
    assert math.log2(len(lines)) - 0.3 <= bits < math.log2(len(lines)) + 1.5
    model = text_diffusion.load(weights)
    assert isinstance(model, Masked)
    written = model.sample(200, steps=20)
    assert len(set(written)) > 30
    assert sum(line in LINES for line in written) > 100


def test_sample_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = folder / "run" / "ema_0.9_000400.pt", folder / "out"
    command = flags(model_name_or_path=weights, num_samples=5, out_dir=out, steps=3, seed=2)
    assert sample.main(command) == 0
    path = out / "ema_0.9_000400.samples_5.steps-3.seed-2.txt"
    written = text_diffusion.load(str(weights)).sample(5, steps=3, seed=2)
    assert path.read_text(encoding="utf-8").splitlines() == written
    capsys.readouterr()
    assert sample.main([*command, "--sampler", "ddim"]) == 1
    assert "--sampler belongs to Gaussian diffusion models" in capsys.readouterr().err


def test_refusals(folder: Path) -> None:
    writer = text_diffusion.load(str(folder / "run" / "ema_0.9_000400.pt"))
    for options, message in (
        ({"steps": 0}, "STEPS must be at least 1, found 0"),
        ({"clamp": True}, "clamp: settings of Gaussian diffusion"),
        ({"batch_size": 0}, "batch size must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            writer.sample(2, **options)
    assert (
        train.main(flags(dataset=folder / "toy.txt", checkpoint_path=folder / "no", **RUN, self_condition=False)) == 1
    )
    assert not (folder / "no").exists()


def test_resume_is_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RUN | {"steps": 6, "dataset": folder / "toy.txt"}
    assert train.main(flags(checkpoint_path=folder / "whole", **options)) == 0
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert train.main(flags(checkpoint_path=folder / "halves", **options)) == 130
    assert train.main(flags(checkpoint_path=folder / "halves", **options)) == 0
    assert same(everything(folder / "whole", 6), everything(folder / "halves", 6))
