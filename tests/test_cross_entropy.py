"""The objective `cross_entropy`: its probabilities against Bayes' rule, its parts, and its commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor
from toy import LINES, SIZES, contents, everything, flags, metrics, one_sentence, same, stop_at, write_text

import text_diffusion.generation
from text_diffusion import chunked, likelihood, train
from text_diffusion.config import ModelConfig
from text_diffusion.cross_entropy import KNOWN_UNTIL, WordDenoiser, cross_entropy_loss, known_words
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.run import prepare
from text_diffusion.schedules import log_snr_at, named_betas
from text_diffusion.step import train_step

Array = npt.NDArray[np.float64]

V, B, L, D, T = 11, 6, 5, 4, 1000
TIMES = torch.tensor([0, 350, 420, 500, 640, 999])
PROCESS = GaussianDiffusion(named_betas("log-snr", T))


def network(**options: Any) -> WordDenoiser:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"in_channel": D, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_channels": 8}
    model = WordDenoiser(ModelConfig(objective="cross_entropy", **sizes | options), V, L)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def batch() -> tuple[Tensor, Tensor, Noise]:
    ids = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(0))
    return ids, TIMES, Noise.draw((1, 2), 0, B, (L, D), torch.device("cpu"))


def noised(model: WordDenoiser) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, x_t and the times that the network is told."""
    ids, t, noise = batch()
    return ids, PROCESS.q_sample(model.get_embeds(ids), t, noise.t).detach(), PROCESS.network_time(t)


def log_gaussian(x_t: Tensor, E: Tensor) -> Array:
    """log N(x_t; alpha E(v), sigma^2 I) of every word v, by SciPy, (B, L, V)."""
    abar = PROCESS.alphas_cumprod[TIMES.numpy()]
    table = np.zeros((B, L, V))
    for b, v in np.ndindex(B, V):
        normal = scipy.stats.multivariate_normal(np.sqrt(abar[b]) * E[v].double().numpy(), (1 - abar[b]) * np.eye(D))
        table[b, :, v] = normal.logpdf(x_t[b].double().numpy())
    return table


def test_the_schedule_is_what_the_network_takes_it_for() -> None:
    lam = log_snr_at(PROCESS.network_time(torch.arange(T))).double().numpy()
    assert PROCESS.alphas_cumprod == pytest.approx(scipy.special.expit(lam), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("denoised", "scale"), [(True, 4.0), (True, 1.0), (False, 4.0)])
def test_probabilities_are_those_of_the_equation(denoised: bool, scale: float) -> None:
    """Eq. (3), term by term, eq. (4) and eq. (7)."""
    model = network(denoised_input=denoised, output_scale=scale, shared_evidence=False)
    _, x_t, times = noised(model)
    E = model.embeddings
    assert E.norm(dim=1) == pytest.approx(math.sqrt(D))
    estimate = torch.randn(B, L, D)
    seen = model.without_estimate(x_t, times) if denoised else x_t
    f = TransformerNetModel.forward(model, seen, times, estimate)
    words = (model.config.output_scale * f @ E.T + model.lm_head.bias).double().numpy()
    expected = scipy.special.log_softmax(words + log_gaussian(x_t, E), axis=-1)
    log_p = model.log_probs(x_t, times, estimate)
    assert log_p.numpy() == pytest.approx(expected, abs=2e-3)  # at the smallest noise scores are in the thousands
    assert model(x_t, times, estimate).numpy() == pytest.approx(np.exp(expected) @ E.double().numpy(), abs=1e-4)


@torch.no_grad()
def test_without_context_it_is_bayes_rule() -> None:
    """Where f says nothing, p(v | x_t) is the posterior of prior softmax(b), and so is the first estimate."""
    model = network(shared_evidence=False)
    for parameter in model.output_down_proj.parameters():
        parameter.zero_()
    _, x_t, times = noised(model)
    E = model.embeddings
    prior = scipy.special.log_softmax(model.lm_head.bias.double().numpy())
    posterior = scipy.special.softmax(prior + log_gaussian(x_t, E), axis=-1)
    assert model.log_probs(x_t, times).exp().numpy() == pytest.approx(posterior, abs=1e-4)
    assert model.without_estimate(x_t, times).numpy() == pytest.approx(posterior @ E.double().numpy(), abs=1e-4)


@torch.no_grad()
def test_without_the_prior_only_the_network_speaks() -> None:
    model = network(output_prior=False, shared_evidence=False)
    _, x_t, times = noised(model)
    seen = model.without_estimate(x_t, times)
    f = TransformerNetModel.forward(model, seen, times, seen)
    expected = (model.config.output_scale * f @ model.embeddings.T + model.lm_head.bias).log_softmax(dim=-1)
    torch.testing.assert_close(model.log_probs(x_t, times), expected)


def test_what_is_seen_carries_gradients_for_steering_alone() -> None:
    """Guidance and the trace of the flow go through it; training does not."""
    model = network(output_prior=False, self_condition=False, shared_evidence=False).eval()
    _, x_t, times = noised(model)
    x_t = x_t.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_probs(x_t, times)[..., 0].sum(), x_t)
    assert gradient.abs().sum() > 0
    model.train()
    (gradient,) = torch.autograd.grad(model.log_probs(x_t, times)[..., 0].sum(), x_t, allow_unused=True)
    assert gradient is None


@torch.no_grad()
def test_temperature_sharpens() -> None:
    model = network()
    _, x_t, times = noised(model)
    cold = (model.log_probs(x_t, times) / 0.5).softmax(dim=-1) @ model.embeddings
    torch.testing.assert_close(model(x_t, times, temperature=0.5), cold)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """x_0, the loss and its gradients are the same whether the scores are computed at once or a few at a time."""
    results = []
    for size in (chunked.CHUNK, 3 * V, 1):
        monkeypatch.setattr(chunked, "CHUNK", size)
        model = network()
        ids, t, noise = batch()
        loss = cross_entropy_loss(model, PROCESS, ids, t, noise).total().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        _, x_t, times = noised(model)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) > 10
        results.append([loss.detach(), model(x_t, times).detach(), *gradients])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_word_is_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another weight for each position, in double precision, two positions at a time."""
    monkeypatch.setattr(chunked, "CHUNK", 2 * V)
    draw = torch.Generator().manual_seed(0)
    q, E, b, g = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((B, L, D), (V, D), (V,), (B, L))
    )
    w = torch.randint(V, (B, L), generator=draw)
    inputs = [x.requires_grad_() for x in (q, E, b)]
    expected = F.cross_entropy((q @ E.T + b).transpose(1, 2), w, reduction="none")
    found = chunked.word_nll(q, E, b, w)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(nll, inputs, g) for nll in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_of_a_large_vocabulary_no_table_of_scores_is_kept() -> None:
    """What autograd keeps for the loss is less than one (B, L, V) table, of which there would be several."""
    words, length, kept = 3000, 64, 0
    model = WordDenoiser(
        ModelConfig(objective="cross_entropy", in_channel=4, hidden_size=8, num_heads=2), words, length
    )
    ids = torch.randint(words, (32, length))

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randn(32, length, 4), torch.full((32,), 400.0), None, ids)
    assert 0 < kept < 32 * length * words / 4


# Known words


@pytest.mark.parametrize("progress", [0.0, 0.3])
def test_known_words_are_shown_and_do_not_count(progress: float) -> None:
    model, (ids, t, noise) = network().train(), batch()
    model.progress = progress
    known = known_words(noise, 1 - progress / KNOWN_UNTIL)
    assert 0 < known.float().mean() < 1
    terms = cross_entropy_loss(model, PROCESS, ids, t, noise)
    at = torch.where(known, 0, t[:, None])
    abar = torch.tensor(PROCESS.alphas_cumprod, dtype=torch.float32)[at][:, :, None]
    E = model.get_embeds(ids)
    x_t, times = abar.sqrt() * E + (1 - abar).sqrt() * noise.t, PROCESS.network_time(at)
    estimate = model.without_estimate(x_t, times).detach()
    estimate[::2] = model(x_t[::2], times[::2]).detach()
    log_p = model.log_probs(x_t, times, estimate).gather(2, ids[:, :, None]).squeeze(2)
    for row, hidden, value in zip(log_p, ~known, terms.cross_entropy, strict=True):
        expected = -row[hidden].mean().item() if hidden.any() else 0.0
        assert value.item() == pytest.approx(expected, abs=1e-5)


def test_validation_knows_no_word() -> None:
    model, (ids, t, noise) = network(), batch()
    other = network(known_words=False)
    evaluated = cross_entropy_loss(model.eval(), PROCESS, ids, t, noise).cross_entropy
    torch.testing.assert_close(evaluated, cross_entropy_loss(other.train(), PROCESS, ids, t, noise).cross_entropy)
    trained = cross_entropy_loss(model.train(), PROCESS, ids, t, noise).cross_entropy
    assert not torch.allclose(trained, evaluated)
    model.progress = KNOWN_UNTIL
    last = cross_entropy_loss(model, PROCESS, ids, t, noise).cross_entropy
    torch.testing.assert_close(last, evaluated, msg="nor do the last steps of training")


def test_shares_of_known_words_are_uniform() -> None:
    """Of 20,000 sentences of 24 words; a false alarm, with another seed, in one run of a thousand."""
    noise = Noise.draw((3, 4), 0, 20_000, (24, 2), torch.device("cpu"))
    counts = known_words(noise, 1.0).sum(dim=1).numpy()  # uniform over 0..24, if each share is as likely
    assert scipy.stats.chisquare(np.bincount(counts, minlength=25)).pvalue > 1e-3
    assert known_words(noise, 0.5).float().mean().item() == pytest.approx(0.25, abs=0.005)
    assert not known_words(noise, 0.0).any()


def test_training_tells_the_network_how_far_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "corpus.txt", LINES)
    run, state = prepare(train.parse(argv(tmp_path, tmp_path / "run", steps=4)))
    seen = []
    for _ in range(3):
        train_step(run, state, state.loss)
        seen.append(state.model.progress)
    assert seen == [0, 0.25, 0.5]
    assert run.lock
    run.lock.release()


# The commands


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a run of 400 steps, by AdamW: with Muon the loss falls faster than time is fitted."""
    folder = tmp_path_factory.mktemp("words")
    write_text(folder / "corpus.txt", LINES)
    assert train.main(argv(folder, folder / "run", steps=400, hidden_size=32, lr=1e-2, optimizer="adamw")) == 0
    return folder


def argv(folder: Path, run: Path, **options: Any) -> list[str]:
    sizes = {name: value for name, value in SIZES.items() if name != "diffusion_steps"}
    return flags(
        **sizes | {"objective": "cross_entropy", "dataset": folder / "corpus.txt", "checkpoint_path": run} | options
    )


def test_it_learns_the_language(words: Path) -> None:
    """Of 500 sentences at 8 calls all but a few are of the language, and they are as different as its 80 can be."""
    model = text_diffusion.load(str(words / "run" / "ema_0.9_000400.pt"))
    sentences = model.sample(500, steps=8, seed=1)
    assert sum(sentence in LINES for sentence in sentences) > 450
    assert len({s for s in sentences if s in LINES}) > 70


def test_the_loss_is_linear_in_the_fitted_time(words: Path) -> None:
    """R^2 of the loss without known words against F(t), while 400 steps are too few to forget how it was at first."""
    model = text_diffusion.generation.load_diffusion(words / "run" / "ema_0.9_000400.pt")
    assert isinstance(model.model, WordDenoiser)
    F = contents(words / "run" / "opt000400.pt")["timestep_sampler"]["F"].double().numpy()
    ids = torch.tensor(model.tokenizer.encode(LINES))
    u = (np.arange(20) + 0.5) / 20
    t = np.interp(u, F, np.linspace(0, model.diffusion.num_timesteps - 1, len(F))).astype(int).tolist()
    losses = []
    for s in t:
        noise = Noise.draw((5, s), 0, len(ids), (ids.shape[1], 8), torch.device("cpu"))
        with torch.no_grad():
            terms = cross_entropy_loss(model.model, model.diffusion, ids, torch.full((len(ids),), s), noise)
        losses.append(float(terms.cross_entropy.mean()))
    assert np.corrcoef(u, losses)[0, 1] ** 2 > 0.9 > np.corrcoef(t, losses)[0, 1] ** 2


def test_temperature_reaches_the_samples(words: Path) -> None:
    model = text_diffusion.load(str(words / "run" / "ema_0.9_000400.pt"))
    usual = model.sample(200, steps=4, seed=1)
    assert model.sample(200, steps=4, seed=1, temperature=1.0) == usual
    assert len(set(model.sample(200, steps=4, seed=1, temperature=0.3))) < len(set(usual))


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_any_number_of_calls(steps: int, words: Path) -> None:
    model = text_diffusion.generation.load_diffusion(words / "run" / "ema_0.9_000400.pt")
    assert len(list(model.denoising(0, 2, steps=steps))) == steps


def test_resuming_is_bit_for_bit(words: Path, tmp_path: Path) -> None:
    """The fitted time too goes on as if nothing had been: it is fitted again on the way."""
    assert train.main(argv(words, tmp_path / "whole", steps=60)) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(31, patch)
        assert train.main(argv(words, tmp_path / "parts", steps=60)) != 0
    assert train.main(argv(words, tmp_path / "parts", steps=60)) == 0
    one, two = everything(tmp_path / "whole", 60), everything(tmp_path / "parts", 60)
    assert same(one, two)
    assert float(one["timestep_sampler"]["updates"]) == 60


def test_likelihood_of_words(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The language has log2 80 = 6.3 bits; a bound cannot be below that by more than chance, nor far above it."""
    weights = words / "run" / "ema_0.9_000400.pt"
    assert likelihood.main([str(weights), str(words / "corpus.txt"), "--steps", "200"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bound of the walk"))
    assert math.log2(80) - 0.1 < float(row.split()[4]) < 1.5 * math.log2(80)


def test_a_walk_of_words_has_fewer_steps_than_training(
    words: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert likelihood.WORD_STEPS == 1000
    monkeypatch.setattr(likelihood, "WORD_STEPS", 20)
    weights = words / "run" / "ema_0.9_000400.pt"
    assert likelihood.main([str(weights), str(words / "corpus.txt")]) == 0
    assert ", 20 steps of two calls" in capsys.readouterr().out


def test_a_corpus_of_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss is soon the same at every t, and time stays what it was."""
    write_text(tmp_path / "corpus.txt", ["One sentence."] * 3)
    assert train.main(argv(tmp_path, tmp_path / "run", steps=400, lr=1e-2)) == 0
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path / "run"))
    model = text_diffusion.load(str(tmp_path / "run" / "ema_0.9_000400.pt"))
    assert model.sample(3, steps=4) == ["One sentence."] * 3


@pytest.mark.parametrize(("name", "value"), [("noise_schedule", "cosine"), ("diffusion_steps", 100)])
def test_flags_of_the_other_objective_are_refused(
    name: str, value: object, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(argv(words, tmp_path / "run", **{name: value})) == 1
    assert f"--{name} belongs to another objective" in one_sentence(capsys.readouterr().err)
    sizes = flags(**SIZES, objective="diffusion_lm", dataset=words / "corpus.txt", checkpoint_path=tmp_path / "run")
    assert train.main([*sizes, "--output_prior", "False"]) == 1
    assert "--output_prior belongs to another objective" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_run_of_one_objective_does_not_go_on_as_another(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = argv(words, words / "run", steps=400, hidden_size=32, lr=1e-2)
    sizes[sizes.index("cross_entropy")] = "diffusion_lm"
    assert train.main(sizes) == 1
    assert "was started with --objective cross_entropy" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(("given", "D"), [({}, 64), ({"size": "base"}, 128), ({"in_channel": 16}, 16)])
def test_dimensions_of_a_word(given: dict[str, Any], D: int, tmp_path: Path) -> None:
    """More than the other objectives' unless the flags say otherwise."""
    corpus = write_text(tmp_path / "toy.txt", LINES)
    for objective, size in (("cross_entropy", D), ("masked", {64: 32}.get(D, D))):
        options = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, **given, "objective": objective}
        run, _ = prepare(train.parse(flags(dataset=corpus, checkpoint_path=tmp_path / objective, **options)))
        assert run.lock is not None
        run.lock.release()
        assert run.model_config.in_channel == size
