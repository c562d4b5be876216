"""The baseline that writes left to right: a distribution over sentences, sampled as it is, trained by the same loop."""

from __future__ import annotations

import json
import math
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import LINES, contents, flags, metrics, one_sentence, same, write_text

import text_diffusion
from text_diffusion import likelihood, sample, train
from text_diffusion.autoregressive import Autoregressive, CausalTransformer, autoregressive_loss, nlls
from text_diffusion.config import ModelConfig
from text_diffusion.errors import UserError
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.losses import Noise
from text_diffusion.schedules import named_betas
from text_diffusion.tokenizer import train_word_level

V, L = 5, 4
SMALL: dict[str, Any] = {"in_channel": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
RUN: dict[str, Any] = SMALL | {"objective": "autoregressive", "batch_size": 32, "ema_rate": 0.9, "eval_interval": 0}


def network(vocab_size: int = V, **options: Any) -> CausalTransformer:
    """Random weights, far from the start's near zero."""
    torch.manual_seed(0)
    model = CausalTransformer(ModelConfig(**SMALL | options), vocab_size, L).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.6)
    return model


def every_sentence(first: int) -> Tensor:
    return torch.tensor([(first, *rest) for rest in product(range(V), repeat=L - 1)])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_probabilities_of_all_sentences_sum_to_one(norm: str) -> None:
    p = (-nlls(network(norm=norm), every_sentence(2)).sum(dim=1)).exp()
    assert len(p) == V ** (L - 1)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(p.max()) > 5 * float(p.mean()), "random weights that say nothing would prove nothing"


def test_no_position_sees_what_follows() -> None:
    model, ids = network(), torch.randint(V, (1, L), generator=torch.Generator().manual_seed(1))
    before = model(ids)
    for position in range(L):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % V
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position:], before[:, position:], atol=1e-3)
    torch.testing.assert_close(model(ids[:, :2]), before[:, :2])  # a prefix is enough, as sampling takes it


def test_loss_is_the_mean_of_the_nlls_whatever_t_and_noise() -> None:
    model, ids, process = network(), every_sentence(0)[:7], GaussianDiffusion(named_betas("sqrt", 5))
    losses = []
    for t in (0, 4):
        noise = Noise(torch.randn(7, L, 4), torch.randn(7, L, 4))
        terms = autoregressive_loss(model, process, ids, torch.full((7,), t), noise)
        assert list(vars(terms)) == ["nll"]
        losses.append(terms.total(torch.rand(7)))
    assert torch.equal(*losses)
    log_p = model(ids).log_softmax(dim=-1)
    by_hand = [-sum(float(log_p[b, i, ids[b, i + 1]]) for i in range(L - 1)) / (L - 1) for b in range(7)]
    assert losses[0].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_samples_follow_the_distribution() -> None:
    """Pearson's statistic of 8,000 samples; a false alarm once in 10^5."""
    tokenizer = train_word_level(["a b c d"])
    model = network(tokenizer.vocab_size)
    model.lm_head.bias[: tokenizer.pad_id + 1] = 0.0
    writer, N = Autoregressive(model, tokenizer, 3, torch.device("cpu")), 8000
    ids = writer._ids(1, 0, N)
    assert ids.shape == (N, 3)
    assert (ids[:, 0] == tokenizer.cls_id).all()
    size = tokenizer.vocab_size
    everything = torch.tensor([(tokenizer.cls_id, *rest) for rest in product(range(size), repeat=2)])
    expected = N * (-nlls(model, everything).sum(dim=1)).exp()
    seen = torch.bincount(ids[:, 1] * size + ids[:, 2], minlength=size**2)
    often = expected >= 5
    rest = torch.stack([expected[~often].sum(), seen[~often].sum()])
    chi = float(((seen - expected)[often] ** 2 / expected[often]).sum() + (rest[1] - rest[0]) ** 2 / rest[0])
    freedom = int(often.sum())
    assert freedom > 10
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom)
    assert torch.equal(writer._ids(1, 100, 140), ids[100:140])  # whatever else is sampled


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a run on the toy corpus, whose 76 training lines are equally likely."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    options = {"steps": 300, "lr": 1e-2, "eval_interval": 150, "log_interval": 100, "hidden_size": 32}
    assert train.main(flags(dataset=corpus, checkpoint_path=folder, **RUN | options)) == 0
    return folder


def test_the_same_loop_trains_it_to_the_entropy(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training lines cost log2 76 bits each, no less on average and hardly more."""
    lines = (teacher / "toy-train.txt").read_text(encoding="utf-8").splitlines()
    figures = teacher / "bits.json"
    weights = str(teacher / "ema_0.9_000300.pt")
    assert likelihood.main([weights, str(teacher / "toy-train.txt"), "--json", str(figures)]) == 0
    assert "-log2 P, exact" in capsys.readouterr().out
    bits = json.loads(figures.read_text())["means"]["exact"]["bits_per_sentence"]
    assert math.log2(len(lines)) - 1e-3 <= bits < math.log2(len(lines)) + 0.5
    row = metrics(teacher, validation=True)[-1]
    assert {"val_loss", "val_nll", "embedding_norm"} <= row.keys()
    assert not {"val_mse", "val_rounding_accuracy"} & row.keys()
    assert not [name for name in metrics(teacher)[0] if "_q" in name]


def test_its_sentences_come_from_the_same_calls(teacher: Path, tmp_path: Path) -> None:
    weights = teacher / "ema_0.9_000300.pt"
    model = text_diffusion.load(str(weights))
    sentences = model.sample(40, seed=3)
    assert sentences == model.sample(40, seed=3, batch_size=7)
    assert sentences != model.sample(40, seed=4)
    assert sum(sentence in LINES for sentence in sentences) > 35
    assert len(set(sentences)) > 20
    argv = flags(model_name_or_path=weights, num_samples=40, seed=3, out_dir=tmp_path)
    assert sample.main(argv) == 0
    written = tmp_path / "ema_0.9_000300.samples_40.seed-3.txt"
    assert written.read_text(encoding="utf-8").splitlines() == sentences
    assert sample.main([*argv, "--format", "jsonl"]) == 0
    first = json.loads(written.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first == {"text": sentences[0], "index": 0, "seed": 3, "weights": weights.name}


def test_it_goes_on_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    def run(folder: str, steps: int, **options: Any) -> dict[str, Any]:
        argv = flags(dataset=corpus, checkpoint_path=tmp_path / folder, steps=steps, **RUN | options)
        assert train.main(argv) == 0
        return contents(tmp_path / folder / f"model{steps:06d}.pt")["state"]  # type: ignore[no-any-return]

    whole = run("whole", 6, save_interval=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for path in (tmp_path / "parts").glob("*000006.pt"):
        path.unlink()
    assert same(run("parts", 6, save_interval=3), whole)
    micro, again = run("micro", 6, microbatch=8), run("again", 6, gradient_checkpointing=True)
    for name, weight in whole.items():  # Adam magnifies rounding, so not to the last digit
        torch.testing.assert_close(micro[name], weight, atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(again[name], weight, atol=1e-3, rtol=1e-2)


def test_what_belongs_to_diffusion_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, text = teacher / "ema_0.9_000300.pt", write_text(tmp_path / "text.txt", LINES[:3])
    with pytest.raises(UserError, match="steps"):
        text_diffusion.load(str(weights)).sample(2, steps=3)
    with pytest.raises(UserError, match="must not be negative"):
        text_diffusion.load(str(weights)).sample(-1)
    with pytest.raises(UserError, match="expected a diffusion model"):
        text_diffusion.generation.load_diffusion(weights)
    commands = [
        (sample.main, flags(model_name_or_path=weights, out_dir=tmp_path / "out", **{name: value}), name)
        for name, value in (("steps", 3), ("clamp", "clamp"), ("show", 1), ("sequence_len", 4), ("top_p", 0.5))
    ]
    commands += [(likelihood.main, [str(weights), str(text), f"--{name}", "1"], name) for name in ("steps", "paths")]
    folder = tmp_path / "run"
    for name, value in (("diffusion_steps", 10), ("self_condition", True), ("noise_schedule", "cosine")):
        argv = flags(dataset=corpus, checkpoint_path=folder, **RUN | {"steps": 1, name: value})
        commands.append((train.main, argv, name))
    for main, argv, name in commands:
        assert main(argv) == 1
        whose = "another objective" if main is train.main else "Gaussian diffusion models"
        assert f"--{name} belongs to {whose}" in one_sentence(capsys.readouterr().err)
    assert not folder.exists()
    assert not (tmp_path / "out").exists()
