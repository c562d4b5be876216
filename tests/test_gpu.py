"""A GPU computes what a CPU does; without one, the same code runs on the CPU, but for what only a GPU can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import (
    LINES,
    SIZES,
    everything,
    flags,
    lines_of,
    metrics,
    one_sentence,
    same,
    stop_at,
    write_samples,
    write_text,
)

from text_diffusion import chunked, train
from text_diffusion.config import LikelihoodConfig, ModelConfig
from text_diffusion.flags import build
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import load
from text_diffusion.likelihood import figures_of, read_text
from text_diffusion.losses import Noise
from text_diffusion.muon import orthogonal
from text_diffusion.objectives import OBJECTIVES
from text_diffusion.parallel import BatchLoss
from text_diffusion.randomness import block_size, draw, normal
from text_diffusion.run import prepare
from text_diffusion.schedules import named_betas
from text_diffusion.step import gradient, train_step

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
CPU = torch.device("cpu")
T, V, B, L, D = 20, 11, 6, 5, 8
WAYS = [(objective, denoiser) for objective in OBJECTIVES for denoiser in ("bert", "modern")]

on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here")
each_objective = pytest.mark.parametrize("objective", list(OBJECTIVES))


@pytest.fixture(autouse=True)
def _emptied() -> None:
    """One test's memory is not another's."""
    if HAS_GPU:
        torch.cuda.empty_cache()


def gradients(objective: str, denoiser: str, device: torch.device) -> dict[str, Tensor]:
    """The terms of the loss of a fixed batch, and every gradient, on the CPU."""
    torch.manual_seed(0)
    chosen = OBJECTIVES[objective]
    given = {"objective": objective, "denoiser": denoiser, "in_channel": D, "hidden_size": 32, "num_layers": 2}
    model = chosen.network(build(ModelConfig, given), V, L).train().to(device)
    noise = Noise.draw((1, 2), 0, B, (L, D), CPU)
    ids, t = torch.randint(V, (B, L)), torch.tensor([0, 7, 0, 19, 1, 12])
    noise = Noise(noise.start.to(device), noise.t.to(device))
    process = GaussianDiffusion(named_betas("sqrt", T), device)
    terms = BatchLoss(model, chosen, process)(ids.to(device), t.to(device), noise)
    torch.autograd.backward(terms.total().sum())
    found = dict(vars(terms))
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in found.items()}


@on_a_gpu
@pytest.mark.parametrize(("objective", "denoiser"), WAYS)
def test_loss_and_gradients(objective: str, denoiser: str) -> None:
    """Of every objective and kind of layers, in float32."""
    here, there = gradients(objective, denoiser, CPU), gradients(objective, denoiser, DEVICE)
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert float((there[name] - value).norm()) <= 1e-3 * float(value.norm()) + 1e-6, name


def test_draws_are_slices_of_longer_ones() -> None:
    """Sentences meet the same noise in any company on a GPU too."""
    size = block_size((3,), DEVICE)
    whole = draw(normal, (1, 2), 0, 2 * size + 7, (3,), DEVICE)
    assert len(torch.unique(whole)) > 0.99 * whole.numel()
    for start, stop in ((0, 5), (size - 1, size + 1), (size, 2 * size), (3, 2 * size + 7)):
        assert torch.equal(draw(normal, (1, 2), start, stop, (3,), DEVICE), whole[start:stop])


@pytest.mark.parametrize("chunk", [3 * 500, 2**20])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and mean of a vocabulary in chunks, against float64 on the CPU."""
    monkeypatch.setattr(chunked, "GPU_CHUNK" if HAS_GPU else "CHUNK", chunk)
    torch.manual_seed(0)
    q, E, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 7, D), (500, D), (500,)))
    w = torch.randint(500, (4, 7))
    mine = q_mine, E_mine, b_mine = [x.to(DEVICE, torch.float32).requires_grad_() for x in (q, E, b)]
    theirs = [x.requires_grad_() for x in (q, E, b)]
    nll = chunked.word_nll(q_mine, E_mine, b_mine, w.to(DEVICE))
    scores = q @ E.T + b
    expected = torch.nn.functional.cross_entropy(scores.transpose(1, 2), w, reduction="none")
    torch.testing.assert_close(nll.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    for one, two in zip(torch.autograd.grad(nll.sum(), mine), torch.autograd.grad(expected.sum(), theirs), strict=True):
        torch.testing.assert_close(one.cpu().double(), two, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        mean = chunked.mean_embedding(q_mine, E_mine, b_mine)
    torch.testing.assert_close(mean.cpu().double(), scores.softmax(dim=-1) @ E, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 32, 64), (3, 64, 32)])
def test_muon_turns_matrices(shape: tuple[int, ...]) -> None:
    """All singular values come near one, in bf16 too."""
    X = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    values = torch.linalg.svdvals(X.float().cpu())
    assert X.dtype == torch.float32
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def toy_flags(corpus: Path, folder: Path, objective: str, **options: Any) -> list[str]:
    """Those of a toy run there, but for what means nothing to the objective."""
    foreign = (*OBJECTIVES[objective].foreign, *OBJECTIVES[objective].process)
    how = {name: value for name, value in (SIZES | options).items() if name not in foreign}
    return flags(dataset=corpus, checkpoint_path=folder, objective=objective, device=DEVICE.type, **how)


@each_objective
def test_it_learns_and_writes(objective: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained and sampled there; the same weights predict the same on the CPU."""
    assert train.main(toy_flags(corpus, tmp_path, objective, steps=60, log_interval=5, warmup_steps=5)) == 0
    rows = metrics(tmp_path)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    weights = tmp_path / "ema_0.9_000060.pt"
    calls = {} if objective == "autoregressive" else {"steps": 4}
    written, _, _ = write_samples(capsys, weights, num_samples=5, device=DEVICE.type, **calls)
    assert len(lines_of(written)) == 5
    text = write_text(tmp_path / "held out.txt", LINES[:20])
    config = LikelihoodConfig(paths=8) if objective in ("masked", "autoregressive") else LikelihoodConfig(steps=20)
    bits = []
    for device in ("cpu", DEVICE.type):
        model = load(weights, device=device)
        read = read_text(text, model.tokenizer, model.sequence_len, 0)
        bits.append(figures_of(model, read, config).lines)
    for name, value in bits[0].items():  # but for autoregressive models, whose bits are exact, of other noise
        assert float(bits[1][name].mean()) == pytest.approx(float(value.mean()), rel=0.2), name


def prepared(corpus: Path, folder: Path, objective: str, **options: Any) -> Any:
    """A toy run there, and its state."""
    run, state = prepare(train.parse(toy_flags(corpus, folder, objective, **options)))
    if run.lock:
        run.lock.release()
    return run, state


@pytest.mark.parametrize("objective", ["diffusion_lm", "cross_entropy"])
def test_micro_batches_change_nothing(objective: str, corpus: Path, tmp_path: Path) -> None:
    """A batch cut into four gives the gradient of one that was not."""
    results = []
    for micro in (0, 2):
        run, state = prepared(corpus, tmp_path / str(micro), objective=objective, microbatch=micro)
        gradient(run, state, state.loss)
        results.append([p.grad.cpu() for p in state.model.parameters() if p.grad is not None])
    for one, two in zip(*results, strict=True):
        assert float((one - two).norm()) <= 1e-4 * float(two.norm()) + 1e-6


def test_a_run_goes_on_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    """With --deterministic True: stopped after three steps of six, it ends where the run ends that was not."""
    how: dict[str, Any] = {"steps": 6, "save_interval": 3, "deterministic": True}
    whole, parts = (toy_flags(corpus, tmp_path / name, "diffusion_lm", **how) for name in ("whole", "parts"))
    assert train.main(whole) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(3, patch)
        assert train.main(parts) == 130
    assert train.main(parts) == 0
    assert same(everything(tmp_path / "whole", 6), everything(tmp_path / "parts", 6))


@on_a_gpu
@each_objective
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_waits_for_nothing(objective: str, optimizer: str, precision: str, corpus: Path, tmp_path: Path) -> None:
    """PyTorch raises where the CPU would wait for the GPU, in any step but those that fit time anew."""
    how: dict[str, Any] = {"objective": objective, "optimizer": optimizer, "precision": precision}
    run, state = prepared(corpus, tmp_path / "run", **how)
    for _ in range(3):
        train_step(run, state, state.loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(run, state, state.loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 6


@on_a_gpu
def test_memory_that_runs_out(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch too large for training is refused in a sentence; sampling goes on with smaller ones."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2**30 / total))
    try:
        how = {"steps": 2, "hidden_size": 256}
        assert train.main(toy_flags(corpus, tmp_path / "run", "diffusion_lm", **how | {"batch_size": 2**18})) == 1
        assert "--microbatch" in one_sentence(capsys.readouterr().err)
        assert train.main(toy_flags(corpus, tmp_path / "small", "diffusion_lm", **how)) == 0
        weights = tmp_path / "small" / "ema_0.9_000002.pt"
        n = 2**17
        found = load(weights, device="cuda").sample(n, batch_size=n, steps=2)
        assert len(found) == n
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_a_gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("objective", ["diffusion_lm", "cross_entropy"])
def test_compiled_in_bf16(objective: str, corpus: Path, tmp_path: Path) -> None:
    """It trains, to about the same loss."""
    losses = {}
    quick: dict[str, Any] = {"precision": "bf16", "compile": True}
    for name, how in (("plain", {}), ("quick", quick)):
        assert train.main(toy_flags(corpus, tmp_path / name, objective, steps=40, log_interval=40, **how)) == 0
        losses[name] = metrics(tmp_path / name)[-1]["loss"]
    torch._dynamo.reset()
    assert losses["quick"] == pytest.approx(losses["plain"], rel=0.05)
