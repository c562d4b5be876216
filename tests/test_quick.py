"""A network in bf16, or compiled, gives what it gave, as float32."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import one_sentence
from untrained import build

from text_diffusion import quick, sample
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.generation import TextDiffusion
from text_diffusion.quick import quicken

CPU = torch.device("cpu")
HOW: dict[str, Any] = {"steps": 6, "sampler": "dpm-solver++"}


def predictions(writer: TextDiffusion) -> torch.Tensor:
    *_, last = writer.denoising(0, 8, **HOW)
    return last.pred_xstart


def test_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU can imitate it."""
    monkeypatch.setattr(quick, "pick_precision", lambda precision, _device: precision)
    plain, writer = predictions(build()), build()
    quicken(writer.model, CPU, precision="bf16")
    found = predictions(writer)
    assert found.dtype == torch.float32
    assert not torch.equal(found, plain)
    assert (found - plain).norm() < 0.05 * plain.norm()


def test_as_before() -> None:
    writer = build()
    quicken(writer.model, CPU)
    assert torch.equal(predictions(writer), predictions(build()))


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiled_network_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch's front end, with nothing generated; once with an estimate and once without."""
    traced: list[int] = []
    whole = torch.compile

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        traced.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward, **options: whole(forward, backend=backend, **options))
    monkeypatch.setenv("CXX", sys.executable)  # it is there, and not asked for anything
    writer = build()
    quicken(writer.model, CPU, compiled=True)
    torch.testing.assert_close(predictions(writer), predictions(build()), rtol=0, atol=1e-5)
    torch._dynamo.reset()
    assert len(traced) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    writer = build()
    quicken(writer.model, CPU, compiled=True)
    torch.testing.assert_close(predictions(writer), predictions(build()), rtol=0, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_graphs_on_a_gpu() -> None:
    """Results of earlier calls, which the solver needs, outlive the next replay."""
    device = torch.device("cuda")

    def on_gpu() -> TextDiffusion:
        writer = build()
        return replace(
            writer, model=writer.model.to(device), diffusion=GaussianDiffusion(writer.diffusion.betas, device)
        )

    writer = on_gpu()
    quicken(writer.model, device, compiled=True)
    torch.testing.assert_close(predictions(writer), predictions(on_gpu()), rtol=0, atol=1e-3)
    torch._dynamo.reset()


def test_no_compiler_and_halting(
    writer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", str(writer), "--num_samples", "2", "--steps", "4", "--compile", "--device", "cpu"]
    assert sample.main([*flags, "--halt", "2"]) == 1
    assert "--compile expects as many sentences in every call, found --halt" in one_sentence(capsys.readouterr().err)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert sample.main(flags) == 1
    assert "expects a C++ compiler, found no no-such-compiler" in one_sentence(capsys.readouterr().err)
