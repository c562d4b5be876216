"""Each term of the objective against the paper's formula, what it trains, and that cutting a batch changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from text_diffusion.config import ModelConfig
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise, Terms, diffusion_lm_loss, first_estimate, mean_flat
from text_diffusion.modeling import TransformerNetModel
from text_diffusion.run import prepare
from text_diffusion.schedules import named_betas
from text_diffusion.step import train_step

Array = npt.NDArray[np.float64]

T, V, B, L, D = 20, 11, 6, 5, 4
BETAS = named_betas("sqrt", T)
ABAR = np.cumprod(1 - BETAS)
TIMES = torch.tensor([0, 7, 0, 19, 1, 12])

both = pytest.mark.parametrize("self_condition", [False, True])


def network(self_condition: bool = False, **options: Any) -> TransformerNetModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"in_channel": D, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_channels": 8}
    return TransformerNetModel(ModelConfig(**sizes | options, self_condition=self_condition), V, L)


def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(BETAS)


def batch(sentences: int = B) -> tuple[Tensor, Tensor, Noise]:
    """Ids, timesteps and noise."""
    ids = torch.randint(V, (sentences, L), generator=torch.Generator().manual_seed(0))
    return ids, TIMES.repeat(2)[:sentences], Noise.draw((1, 2), 0, sentences, (L, D), torch.device("cpu"))


def numpy(x: Tensor) -> Array:
    values: Array = x.detach().double().numpy()
    return values


def noised(model: TransformerNetModel, ids: Tensor, t: Tensor, noise: Noise) -> tuple[Array, Array, Array]:
    """E(w), x_0 and x_t, in float64."""
    mean = numpy(model.word_embedding.weight)[ids.numpy()]
    x_start = mean + math.sqrt(1 - ABAR[0]) * numpy(noise.start)
    abar = ABAR[t.numpy()][:, None, None]
    return mean, x_start, np.sqrt(abar) * x_start + np.sqrt(1 - abar) * numpy(noise.t)


def predict(model: TransformerNetModel, x_t: Array, t: Tensor) -> Array:
    """f as in training: even sentences see a first estimate, odd ones zeros."""
    x, times = torch.tensor(x_t, dtype=torch.float32), 1000 / T * t.float()
    with torch.no_grad():
        if not model.config.self_condition:
            return numpy(model(x, times))
        estimate = model(x, times, torch.zeros_like(x))
        estimate[1::2] = 0
        return numpy(model(x, times, estimate))


# The terms


@both
def test_terms_are_the_paper_s(self_condition: bool) -> None:
    """mse (to E(w) itself at t = 0), tT_loss and decoder_nll, computed again in NumPy for each sentence."""
    model = network(self_condition)
    ids, t, noise = batch()
    with torch.no_grad():
        terms = diffusion_lm_loss(model, diffusion(), ids, t, noise)
    mean, x_start, x_t = noised(model, ids, t, noise)
    prediction = predict(model, x_t, t)
    logits = x_start @ numpy(model.word_embedding.weight).T + numpy(model.lm_head.bias)

    for b in range(B):
        target = mean[b] if t[b] == 0 else x_start[b]
        assert float(terms.mse[b]) == pytest.approx(np.mean((target - prediction[b]) ** 2), rel=1e-4)
        assert float(terms.tT_loss[b]) == pytest.approx(ABAR[T - 1] * np.mean(x_start[b] ** 2), rel=1e-5)
        nll = [-math.log(math.exp(row[w]) / np.exp(row).sum()) for row, w in zip(logits[b], ids[b], strict=True)]
        assert float(terms.decoder_nll[b]) == pytest.approx(np.mean(nll), rel=1e-5)
    assert all(term.shape == (B,) and term.dtype == torch.float32 for term in vars(terms).values())


def test_target_at_t_0_is_the_embedding_without_noise() -> None:
    """With a network that says E(w), the error is nothing at t = 0, and x_0's own noise everywhere else."""
    model = network()
    ids, t, noise = batch()
    model.forward = lambda *_, **__: model.get_embeds(ids)  # type: ignore[method-assign]
    mse = numpy(diffusion_lm_loss(model, diffusion(), ids, t, noise).mse)
    expected = (1 - ABAR[0]) * np.mean(numpy(noise.start) ** 2, axis=(1, 2))
    np.testing.assert_allclose(mse, np.where(t.numpy() == 0, 0.0, expected), rtol=1e-5, atol=1e-12)


def test_expected_loss_at_the_last_step() -> None:
    """E[tT_loss] = abar_{T-1} (mean of E(w)^2 + 1 - abar_0).

    It is quadratic in the noise, so the average over noise 1 and noise -1 is the expectation, without chance.
    """
    model = network()
    ids, t, _ = batch()
    ones = torch.ones(B, L, D)
    losses = [diffusion_lm_loss(model, diffusion(), ids, t, Noise(sign * ones, ones)).tT_loss for sign in (1, -1)]
    squares = np.mean(numpy(model.get_embeds(ids)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(numpy((losses[0] + losses[1]) / 2), ABAR[-1] * (squares + 1 - ABAR[0]), rtol=1e-5)


def test_decoder_nll_of_known_logits() -> None:
    """Embeddings a e_w and no noise: the right word's logit is a^2 + its bias, the others' are their biases."""
    model = network(in_channel=V)
    a, bias = 1.5, torch.linspace(-1, 1, V)
    with torch.no_grad():
        model.word_embedding.weight.copy_(a * torch.eye(V))
        model.lm_head.bias.copy_(bias)
    ids = torch.arange(V)[:, None].repeat(1, L)  # sentence w says w, L times
    silence = Noise(torch.zeros(V, L, V), torch.zeros(V, L, V))
    nll = diffusion_lm_loss(model, diffusion(), ids, torch.zeros(V, dtype=torch.int64), silence).decoder_nll.detach()
    total = bias.double().exp().sum()
    for w in range(V):
        right = math.exp(a**2 + float(bias[w]))
        expected = -math.log(right / (float(total) - math.exp(float(bias[w])) + right))
        assert float(nll[w]) == pytest.approx(expected, rel=1e-5)


def test_weights_touch_only_the_mse() -> None:
    """The other terms do not depend on t, so correcting for how t was drawn would only add noise to them."""
    terms = Terms(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0]))
    assert terms.total().tolist() == [111.0, 222.0]
    assert terms.total(torch.tensor([3.0, 0.5])).tolist() == [113.0, 221.0]


def test_mean_flat() -> None:
    assert mean_flat(torch.arange(12.0).view(2, 3, 2)).tolist() == [2.5, 8.5]
    assert mean_flat(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_sentences_do_not_meet() -> None:
    """A sentence's terms are the same among others as in a batch of its own."""
    model = network()
    ids, t, noise = batch()
    whole = diffusion_lm_loss(model, diffusion(), ids, t, noise)
    for b in range(B):
        one = slice(b, b + 1)
        alone = diffusion_lm_loss(model, diffusion(), ids[one], t[one], Noise(noise.start[one], noise.t[one]))
        for name, term in vars(alone).items():
            torch.testing.assert_close(term, getattr(whole, name)[one])


def test_bfloat16_changes_digits_only() -> None:
    """Under autocast the terms are still float32, and near those of float32."""
    model = network(self_condition=True)
    ids, t, noise = batch()
    exact = diffusion_lm_loss(model, diffusion(), ids, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        rough = diffusion_lm_loss(model, diffusion(), ids, t, noise)
    for name, term in vars(rough).items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, getattr(exact, name), rtol=0.02, atol=0)


# Noise


def test_noise_draws_are_two_and_those_of_the_sentences() -> None:
    device = torch.device("cpu")
    whole = Noise.draw((5,), 0, 70, (L, D), device)
    part = Noise.draw((5,), 30, 65, (L, D), device)
    assert whole.start.shape == whole.t.shape == (70, L, D)
    assert torch.equal(part.start, whole.start[30:65])
    assert torch.equal(part.t, whole.t[30:65])
    assert not torch.isclose(whole.start, whole.t).any(dim=2).all(dim=1).any()


# Gradients


def reference_gradient(model: TransformerNetModel, terms: set[str]) -> dict[str, Tensor]:
    """Gradient of the mean of some terms, the objective written out again on tensors."""
    ids, t, noise = batch()
    E, bias = model.word_embedding.weight, model.lm_head.bias
    abar = torch.tensor(ABAR, dtype=torch.float32)
    x_start = E[ids] + torch.sqrt(1 - abar[0]) * noise.start
    signal = abar[t][:, None, None]
    x_t = signal.sqrt() * x_start + (1 - signal).sqrt() * noise.t
    times, zeros = 1000 / T * t.float(), torch.zeros_like(x_t)
    even = (torch.arange(B) % 2 == 0)[:, None, None]
    x_self = torch.where(even, model(x_t, times, zeros), zeros).detach()
    loss = torch.zeros(())
    if "mse" in terms:
        target = torch.where((t == 0)[:, None, None], E[ids], x_start)
        loss = loss + (target - model(x_t, times, x_self)).square().mean()
    if "tT_loss" in terms:
        loss = loss + abar[-1] * x_start.square().mean()
    if "decoder_nll" in terms:
        scores = torch.log_softmax(x_start @ E.T + bias, dim=-1)
        loss = loss - scores.gather(2, ids[:, :, None]).mean()
    return gradient(model, loss)


def gradient(model: TransformerNetModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


@both
@pytest.mark.parametrize("term", ["mse", "tT_loss", "decoder_nll"])
def test_gradient_of_each_term(term: str, self_condition: bool) -> None:
    """Nothing is detached but the first estimate: each term trains the embeddings too, through every path."""
    model = network(self_condition)
    ids, t, noise = batch()
    ours = gradient(model, getattr(diffusion_lm_loss(model, diffusion(), ids, t, noise), term).mean())
    theirs = reference_gradient(model, {term})
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-6)
    assert float(ours["word_embedding.weight"].abs().max()) > 0
    assert (float(ours["lm_head.bias"].abs().max()) > 0) == (term == "decoder_nll")
    assert (float(ours["input_up_proj.0.weight"].abs().max()) > 0) == (term == "mse")


@both
@pytest.mark.parametrize("micro", [2, 4, 10])
def test_micro_batches_by_their_share_are_the_batch(micro: int, self_condition: bool) -> None:
    """The gradients of even cuts of a batch of 10, each by its share, add up to the batch's."""
    model = network(self_condition)
    ids, t, noise = batch(10)
    weights = torch.linspace(0.5, 1.5, 10)
    whole = gradient(model, diffusion_lm_loss(model, diffusion(), ids, t, noise).total(weights).mean())
    summed = {name: torch.zeros_like(grad) for name, grad in whole.items()}
    for start in range(0, 10, micro):
        part = slice(start, min(start + micro, 10))
        terms = diffusion_lm_loss(model, diffusion(), ids[part], t[part], Noise(noise.start[part], noise.t[part]))
        for name, grad in gradient(model, terms.total(weights[part]).sum() / 10).items():
            summed[name] += grad
    for name, grad in whole.items():
        torch.testing.assert_close(summed[name], grad, rtol=1e-4, atol=1e-6)


@both
def test_training_step_does_not_depend_on_the_micro_batch(tmp_path: Path, self_condition: bool) -> None:
    """`train_step` arrives at one gradient, one set of losses and one set of weights, however the batch is cut."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {a} {b} is {c}.\n" for a in "pqr" for b in "stuv" for c in "wxyz"), encoding="utf-8")

    def step(microbatch: int) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
        run, state = prepare(
            {
                "train_txt_path": str(text),
                "val_txt_path": str(text),
                "checkpoint_path": str(tmp_path / f"run{microbatch}"),
                "batch_size": 38,
                "microbatch": microbatch,
                "diffusion_steps": T,
                "self_condition": self_condition,
                "in_channel": D,
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "num_channels": 8,
                "gradient_clipping": 0.0,
                "optimizer": "adamw",
                "device": "cpu",
            }
        )
        grads: list[Tensor] = []
        # AdamW's first step is the gradient's sign, near enough, so the gradients themselves are compared.
        state.optimizer.register_step_pre_hook(
            lambda *_: grads.extend(p.grad.clone() for p in state.model.parameters() if p.grad is not None)
        )
        values, norm = train_step(run, state, state.loss)
        assert float(norm) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in grads)), rel=1e-5)
        return grads, values, [p.detach() for p in state.model.parameters()]

    grads, values, weights = step(0)
    assert len(grads) == len(weights)
    for microbatch in (10, 2):
        other_grads, other_values, _ = step(microbatch)
        for ours, theirs in zip(other_grads, grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        for name, value in values.items():
            torch.testing.assert_close(other_values[name], value)


# Self-conditioning


class Spy(TransformerNetModel):
    """Keeps what it is called with."""

    def forward(
        self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None = None, *, condition: Tensor | None = None
    ) -> Tensor:
        if not hasattr(self, "calls"):
            self.calls: list[tuple[Tensor, Tensor, Tensor | None, bool, Tensor]] = []
        out = super().forward(x_t, timesteps, x_self)
        self.calls.append((x_t, timesteps, x_self, torch.is_grad_enabled(), out))
        return out


@pytest.mark.parametrize("sentences", [1, 2, 5, 6])
def test_every_second_sentence_sees_a_first_estimate(sentences: int) -> None:
    """Even sentences get the network's own estimate, made without autograd; odd ones get zeros."""
    spy = Spy(network(True).config, V, L)
    x_t = torch.randn(sentences, L, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    times = 1000 / T * TIMES[:sentences].float()
    estimate = first_estimate(spy, x_t, times)
    ((seen, seen_times, first_self, graded, first),) = spy.calls
    assert torch.equal(seen, x_t[::2])
    assert torch.equal(seen_times, times[::2])
    assert first_self is None
    assert not graded
    assert estimate is not None
    assert not estimate.requires_grad
    assert torch.equal(estimate[::2], first)
    assert float(first.abs().min()) > 0
    assert not estimate[1::2].any()


def test_the_estimate_is_what_the_loss_shows_the_network() -> None:
    spy = Spy(network(True).config, V, L)
    diffusion_lm_loss(spy, diffusion(), *batch())
    (*_, first), (_, times, estimate, graded, _) = spy.calls
    assert graded
    assert torch.equal(times, 1000 / T * TIMES.float())
    assert estimate is not None
    assert torch.equal(estimate[::2], first)


def test_without_self_conditioning_there_is_one_call() -> None:
    spy = Spy(network(False).config, V, L)
    diffusion_lm_loss(spy, diffusion(), *batch())
    assert len(spy.calls) == 1
    assert first_estimate(spy, torch.zeros(B, L, D), TIMES.float()) is None
