"""Guidance by scores: against closed forms, and by a classifier that is trained here."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import LINES, one_sentence, write_text

from text_diffusion import sample
from text_diffusion.control import Control, InnerSteps, Label, Scorer, Want, train_classifier
from text_diffusion.control import classifier as classifiers
from text_diffusion.control.classifier import Classifier
from text_diffusion.control.labeled import read
from text_diffusion.control.options import ControlConfig
from text_diffusion.control.steering import Predict, Steered
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import TextDiffusion, load_diffusion
from text_diffusion.schedules import named_betas

SAMPLERS = ["ancestral", "ddim", "dpm-solver++", "heun"]


class Points:
    """x_0 is one of N points with the probabilities p: everything is known in closed form."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)  # (N, L, D)
        self.p = torch.rand(6, generator=generator, dtype=torch.float64).softmax(0)
        self.is_c = torch.tensor([True, False, True, False, False, True])
        self.process = GaussianDiffusion(named_betas("sqrt", 100))

    def weights(self, x_t: Tensor, s: int) -> Tensor:
        """log p(point) p(x_t | point), up to a constant, (B, N)."""
        abar = float(self.process.alphas_cumprod[s])
        distance = (x_t[:, None] - math.sqrt(abar) * self.points).square().sum(dim=(2, 3))
        return self.p.log() - distance / (2 * (1 - abar))

    def denoise(self, x_t: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        """E[x_0 | x_t]."""
        return torch.einsum("bn,nld->bld", self.weights(x_t, int(t[0])).softmax(dim=1), self.points)


class OfPoints:
    """log p(c | x_t), exactly."""

    strength = 1.0

    def __init__(self, points: Points) -> None:
        self.points = points

    def log_prob(self, x_t: Tensor, timesteps: Tensor, predict: Predict) -> Tensor:
        s = round(float(timesteps[0]) / self.points.process.time_scale)
        weights = self.points.weights(x_t, s)
        return weights[:, self.points.is_c].logsumexp(dim=1) - weights.logsumexp(dim=1)


def test_eq_1_is_exact() -> None:
    """With an exact classifier the steered denoiser is E[x_0 | x_t, c], at every level that has signal."""
    points = Points()
    steered = Steered(points.denoise, None, points.process, [OfPoints(points)])  # type: ignore[arg-type]
    for s in (0, 1, 10, 50, 80, 95):
        t = torch.full((5,), s)
        generator = torch.Generator().manual_seed(s)
        noise = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
        abar = float(points.process.alphas_cumprod[s])
        x_t = math.sqrt(abar) * points.points[:5] + math.sqrt(1 - abar) * noise
        given_c = points.weights(x_t, s).masked_fill(~points.is_c, -torch.inf).softmax(dim=1)
        expected = torch.einsum("bn,nld->bld", given_c, points.points)
        torch.testing.assert_close(steered(x_t, t, None), expected, rtol=1e-4, atol=1e-4)


class Linear:
    """log p(c | x_t) = g . x_t."""

    strength = 1.0

    def __init__(self, g: Tensor) -> None:
        self.g = g

    def log_prob(self, x_t: Tensor, timesteps: Tensor, predict: Predict) -> Tensor:
        return (self.g * x_t).flatten(1).sum(dim=1)


def arrive(update: InnerSteps, count: int, s: int = 40) -> tuple[Tensor, Tensor, float]:
    """Where Diffusion-LM's update takes x_s = mean = 0, with gradient g, and Sigma."""
    process = GaussianDiffusion(named_betas("sqrt", 100))
    g = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    generator = torch.Generator().manual_seed(3)
    noise = (lambda s, k: torch.randn(count, 2, 2, generator=generator)) if update.langevin else None
    steered = Steered(lambda x, t, p: x, None, process, [Linear(g)], None, update, noise)  # type: ignore[arg-type]
    mean = torch.zeros(count, 2, 2)
    return steered.arrive(mean, mean, s), g, float(process.posterior_variance[s + 1])


def test_adagrad_finds_the_most_probable() -> None:
    """argmax of g . x - |x|^2 / (2 Sigma) is Sigma g."""
    x, g, variance = arrive(InnerSteps(400, 0.02), 1)
    torch.testing.assert_close(x[0], variance * g, rtol=0.05, atol=1e-3)


def test_langevin_draws() -> None:
    """From exp(g . x - |x|^2 / (2 Sigma)), which is N(Sigma g, Sigma), but for Euler's 1 / (1 - lr / 2)."""
    x, g, variance = arrive(InnerSteps(60, 0.1, langevin=True), 4000)
    error = 5 * math.sqrt(variance / 4000)  # a false alarm once in 100,000 or so
    torch.testing.assert_close(x.mean(dim=0), variance * g, rtol=0, atol=error)
    torch.testing.assert_close(x.var(dim=0), torch.full((2, 2), variance / 0.95), rtol=0.12, atol=0)


# A classifier


@pytest.fixture(scope="module")
def model(writer: Path) -> TextDiffusion:
    return load_diffusion(writer)


@pytest.fixture(scope="module")
def colours(classifier: Path, model: TextDiffusion) -> Classifier:
    return classifiers.load(classifier, model)


def share(sentences: list[str], word: str) -> float:
    return sum(word in line.split() for line in sentences) / len(sentences)


@pytest.mark.parametrize("update", [None, InnerSteps(3, 0.2)], ids=["score", "adagrad"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_label_rises(sampler: str, update: InnerSteps | None, model: TextDiffusion, colours: Classifier) -> None:
    """The sign: with every sampler and label the share of the label's word goes far up, not down."""
    steps = 16 if sampler == "heun" else 8
    free = model.sample(60, steps=steps, sampler=sampler)
    for label in ("red", "old"):
        controls: list[Control] = [Label(colours, label), *([update] if update else [])]
        assert (
            share(model.sample(60, steps=steps, sampler=sampler, controls=controls), label) > share(free, label) + 0.4
        )


def test_langevin_rises(model: TextDiffusion, colours: Classifier) -> None:
    controls: list[Control] = [Label(colours, "blue"), InnerSteps(5, 0.3, langevin=True)]
    sentences = model.sample(60, steps=15, sampler="ancestral", controls=controls)
    assert share(sentences, "blue") > share(model.sample(60, steps=15, sampler="ancestral"), "blue") + 0.2
    assert model.sample(40, steps=15, sampler="ancestral", controls=controls, batch_size=7) == sentences[:40]
    with pytest.raises(UserError, match="Langevin steps belong to the sampler ancestral"):
        model.sample(1, steps=3, controls=controls)


def test_label_s_probability_rises(model: TextDiffusion, colours: Classifier) -> None:
    """One step along the gradient of log p(label | x_t), for the classifier itself: p(label) goes up for each x_t."""
    torch.manual_seed(0)
    x_t = torch.randn(20, model.sequence_len, model.model.config.in_channel)
    label = Label(colours, "red")
    for t in (1, 5, 15):
        times = model.diffusion.network_time(torch.full((20,), t))

        def log_prob(x: Tensor, times: Tensor = times) -> Tensor:
            return label.log_prob(x, times, lambda: x_t)

        x = x_t.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(x).sum(), x)
        assert bool((log_prob(x_t + 1e-2 * gradient) > log_prob(x_t)).all())


def test_either_of_two_labels(model: TextDiffusion, colours: Classifier) -> None:
    sentences = model.sample(60, steps=8, controls=[Label(colours, ("red", "blue"), 3.0)])
    red, blue = share(sentences, "red"), share(sentences, "blue")
    assert red + blue > 0.8
    assert min(red, blue) > 0.1


def test_controls_add_up(model: TextDiffusion, colours: Classifier) -> None:
    """A label, a word and a scorer of one's own, at once."""
    hot = model.tokenizer.backend.get_vocab()["Ġhot"]
    scorer = Scorer(lambda log_p: log_p[:, :, hot].logsumexp(dim=1))
    sentences = model.sample(60, steps=8, controls=[Label(colours, "new"), Want("egg"), scorer])
    assert all(re.search(r"\begg\b", line) for line in sentences)
    assert share(sentences, "new") > 0.7
    assert sum("hot" in line for line in sentences) / 60 > 0.6
    assert sum("hot" in line for line in model.sample(60, steps=8)) / 60 < 0.5


def test_sentences_are_the_same_in_any_batch(model: TextDiffusion, colours: Classifier) -> None:
    sentences = model.sample(40, steps=5, controls=[Label(colours, "red")])
    assert model.sample(40, steps=5, controls=[Label(colours, "red")], batch_size=9) == sentences


def test_strength_and_range(model: TextDiffusion, colours: Classifier) -> None:
    """Nothing happens outside of the range, and more with more strength."""
    free = model.sample(60, steps=8)
    weak, strong = (model.sample(60, steps=8, controls=[Label(colours, "red", s)]) for s in (0.3, 2.0))
    assert share(free, "red") < share(weak, "red") < share(strong, "red")
    left_out = max(set(range(19)) - {step.t for step in model.denoising(0, 1, steps=8)})
    with pytest.raises(UserError, match=r"a network call at a t where .* none of 8 from t 19 to 0; .* a wider --guid"):
        model.sample(60, steps=8, controls=[Label(colours, "red", 3.0, low=left_out, high=left_out)])
    with pytest.raises(UserError, match="none of 1 from t 19 to 19; take more STEPS"):
        model.sample(60, steps=1, controls=[Label(colours, "red")])
    part = model.sample(60, steps=8, controls=[Label(colours, "red", 2.0, low=0, high=2)])
    assert share(free, "red") <= share(part, "red") < share(strong, "red")
    with pytest.raises(UserError, match="--guidance_range must begin at t 18 or below"):
        model.sample(1, steps=8, controls=[Label(colours, "red", 3.0, low=19)])


def test_gradients_come_about_in_inference_mode(model: TextDiffusion, colours: Classifier) -> None:
    controls: list[Control] = [Label(colours, "red"), Want("fig")]
    expected = model.sample(5, steps=5, controls=controls)
    with torch.inference_mode():
        assert model.sample(5, steps=5, controls=controls) == expected


def test_saved_and_loaded(model: TextDiffusion, colours: Classifier, tmp_path: Path) -> None:
    colours.save(tmp_path / "again.pt")
    again = classifiers.load(str(tmp_path / "again.pt"), model)
    assert again.labels == colours.labels == ("blue", "new", "old", "raw", "red")
    x, times = torch.randn(3, model.sequence_len, 8), model.diffusion.network_time(torch.tensor([0, 7, 19]))
    assert torch.equal(again.network(x, times), colours.network(x, times))


def test_accuracy_by_noise_level(
    writer: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is reported; it is near 1 without noise, near chance with nothing but noise; the same seed gives the same."""
    labeled = write_text(tmp_path / "labeled.tsv", [f"{line}\t{line.split()[1]}" for line in 3 * LINES])
    argv = [str(writer), "--labeled", str(labeled), "--steps", "60", "--hidden_size", "32", "--lr", "5e-3"]
    outs = []
    for name in ("a.pt", "b.pt"):
        assert train_classifier.main([*argv, "--out", str(tmp_path / name)]) == 0
        outs.append(capsys.readouterr().out.replace(name, ""))
    assert outs[0] == outs[1]
    found = re.findall(r"^t +(\d+) +([\d.]+)%$", outs[0], re.MULTILINE)
    assert [int(t) for t, _ in found] == sorted({round(i * 1.9) for i in range(11)})
    assert float(found[0][1]) >= 50
    assert "always the most frequent label" in outs[0]


# What will not do


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a b\tx", "a c"], "in line 2, found no label"),
        (["a b\tx", "a c\t"], "in line 2, found no label"),
        (["a b\tx", "", "c\ty"], "in line 2, found an empty line"),
        (["\tx", "c\ty"], "in line 1, found an empty field"),
        (["a\tb\tx", "c\ty"], "in line 1, found 2 tabs"),
        (["a\tx", "c\tx"], "lines of at least two labels to learn from, found only 'x'"),
        (["a\tx", "c\ty"], "several different sentences of each label"),
    ],
)
def test_labeled_files(lines: list[str], message: str, tmp_path: Path) -> None:
    path = write_text(tmp_path / "labeled.tsv", lines)
    with pytest.raises(UserError, match=message) as found:
        read(path)
    assert str(path) in str(found.value)


def test_command_refuses(writer: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labeled = write_text(tmp_path / "labeled.tsv", [f"{line}\t{line.split()[1]}" for line in LINES])
    bad = {
        "one": ["The red fig\tred", "The blue fig\tred"],
        "empty": ["The red fig\tred", "The blue fig\t", "\tblue"],
        "no tab": ["The red fig\tred", "The blue fig\tblue", "The blue fig"],
    }
    files = {name: str(write_text(tmp_path / f"{name}.tsv", lines)) for name, lines in bad.items()}
    for argv, message in (
        (
            [str(writer), "--labeled", files["one"]],
            "one.tsv: expected lines of at least two labels to learn from, found only 'red'",
        ),
        (
            [str(writer), "--labeled", files["empty"]],
            "empty.tsv: expected a sentence, a tab and a label in line 2, found",
        ),
        (
            [str(writer), "--labeled", files["no tab"]],
            "no tab.tsv: expected a sentence, a tab and a label in line 3, fo",
        ),
        ([str(writer)], "expected lines `sentence TAB label`, found no file; --labeled FILE names another"),
        ([str(writer), "--labeled", str(tmp_path / "none.tsv")], "none.tsv"),
        ([str(writer), "--labeled", str(labeled), "--hidden_size", "6"], "--hidden_size must be a multiple of 4"),
        ([str(trained / "none.pt"), "--labeled", str(labeled)], "expected a checkpoint"),
        ([str(writer), "--labeled", str(labeled), "--steps", "3", "--lr", "1e30"], "--lr 1e+30 is too high, lower it"),
        ([], "CKPT"),
    ):
        assert train_classifier.main([*argv, "--out", str(tmp_path / "out.pt")] if argv else argv) == 1
        assert message in one_sentence(capsys.readouterr().err)
        assert not (tmp_path / "out.pt").exists()
    assert train_classifier.main([str(writer), "--labeled", str(labeled), "--out", str(tmp_path)]) == 1
    assert "expected a file to write to, found a folder" in one_sentence(capsys.readouterr().err)
    for path in (writer, labeled):
        assert train_classifier.main([str(writer), "--labeled", str(labeled), "--out", str(path)]) == 1
        assert "expected a file of its own to write to" in one_sentence(capsys.readouterr().err)


def test_foreign_classifiers(
    model: TextDiffusion, classifier: Path, writer: Path, trained: Path, tmp_path: Path
) -> None:
    other = load_diffusion(trained / "model000006.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(classifier.read_bytes()[:1000])
    for path, who, message in (
        (tmp_path / "none.pt", model, "--label expects a classifier, found none at .*; `python -m"),
        (writer, model, "expected a classifier, found another kind of file"),
        (classifier, other, f"expected a classifier of these weights, found that of {writer.name}"),
        (damaged, model, "truncated"),
    ):
        with pytest.raises(UserError, match=message):
            classifiers.load(path, who)
    found = classifiers.load(classifier, model)
    with torch.no_grad():
        found.network.head.bias[0] = torch.nan
    found.save(damaged)
    with pytest.raises(UserError, match="expected finite weights, found a classifier whose training has failed"):
        classifiers.load(damaged, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "green"}, "--label must be one that the classifier knows: blue, new, old, raw, red; found 'green'"),
        ({"strength": 0.0}, "--guidance_strength must be above 0"),
        ({"low": 5, "high": 2}, "--guidance_range must lie within 0-19, found 5-2"),
        ({"high": 20}, "--guidance_range must lie within 0-19"),
    ],
)
def test_refused(change: dict[str, Any], message: str, model: TextDiffusion, colours: Classifier) -> None:
    with pytest.raises(UserError, match=message):
        model.sample(1, controls=[replace(Label(colours, "red"), **change)])


def test_combinations_refused(model: TextDiffusion, colours: Classifier, trained: Path) -> None:
    red, blue = Label(colours, "red"), Label(colours, "blue")
    scorer = Scorer(lambda log_p: log_p.sum(dim=(1, 2)))
    cases: list[tuple[list[Control], str]] = [
        ([red, blue], "--label takes one of a classifier's labels, found 'red' and 'blue'"),
        ([InnerSteps()], "--inner_steps is about following a score"),
        ([red, InnerSteps(0)], "--inner_steps must be at least 1"),
        ([red, InnerSteps(), InnerSteps()], "one --inner_steps is expected, found two"),
        ([scorer, InnerSteps()], "a Scorer goes through the denoiser"),
    ]
    for controls, message in cases:
        with pytest.raises(UserError, match=message):
            model.sample(1, controls=controls)
    with pytest.raises(UserError, match="--label expects a classifier of these weights"):
        load_diffusion(trained / "model000006.pt").sample(1, steps=2, controls=[red])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda log_p: log_p[:, :, 4].mean(), "3 numbers, one for each sentence, found shape ()"),
        (lambda log_p: log_p[:, :, 4], "found shape (3, 8)"),
        (lambda log_p: log_p[:, :, 4].mean(dim=1).detach(), "found shape (3,), detached"),
        (lambda log_p: 1.0, "found float"),
        (lambda log_p: log_p[:, :, 4].mean(dim=1) * torch.nan, "expected a finite gradient of what is wanted"),
    ],
)
def test_scorers_that_give_something_else(function: Any, message: str, model: TextDiffusion) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model.sample(3, steps=8, controls=[Scorer(function)])


@pytest.mark.parametrize("controls", [["red"], Want("red"), "red"])
def test_what_is_no_control(controls: Any, model: TextDiffusion) -> None:
    with pytest.raises(UserError, match="controls must be a list of Want, Template"):
        model.sample(1, controls=controls)


def test_labels_of_any_name(
    writer: Path, model: TextDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With commas and bars in them; two of one file are found to be of one."""
    names = {"red": "a, b", "blue": "x|y", "old": "c"}
    lines = [f"{line}\t{names[line.split()[1]]}" for line in 3 * LINES if line.split()[1] in names]
    out = str(tmp_path / "odd.pt")
    argv = [str(writer), "--labeled", str(write_text(tmp_path / "odd.tsv", lines)), "--out", out, "--hidden_size", "8"]
    assert train_classifier.main([*argv, "--steps", "2"]) == 0

    def wanted(label: str, classifier: str) -> list[Any]:
        return [c.label for c in ControlConfig(label=label, classifier=classifier).labels(model, writer)]  # type: ignore[union-attr]

    assert wanted("a, b", out) == [("a, b",)]
    assert wanted("x|y", out) == [("x|y",)]
    assert wanted("x|y,c", f"{out},{out}") == [("x|y",), ("c",)]
    assert wanted("c|d", out) == [("c", "d")]
    flags = ["--model_name_or_path", str(writer), "--label", "c,x|y", "--classifier", f"{out},{out}"]
    assert sample.main(flags) == 1
    assert "found 'c' and 'x|y' of the same" in one_sentence(capsys.readouterr().err)
