"""Several ranks do what one does: gradients, weights, sentences."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_worker import CASES
from toy import LINES, SIZES, flags, write_text
from zygote import Zygote, ended, start_ranks, unless_crashed

from text_diffusion import train
from text_diffusion.distributed import ALONE, Ranks

# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 48, 49])
def test_shares(size: int, n: int) -> None:
    """They follow each other, cover everything once, begin at even places, and are equal where that is possible."""
    shares = [Ranks(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in range(n)[share]] == list(range(n))
    assert all(share.start % 2 == 0 for share in shares)
    if n % (2 * size) == 0:
        assert {share.stop - share.start for share in shares} == {n // size}


def test_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    assert ALONE.join(tensors) is tensors
    assert ALONE.gather(3) == [3]
    assert ALONE.total({"a": 1.5}) == {"a": 1.5}
    assert ALONE.together(lambda: 4) == 4
    assert not ALONE.any(False)
    ALONE.agree("flags", {"a": 1})


# The same on 1, 2 and 4 ranks

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """What the worker found, by the number of ranks."""

    def work(size: int, attempt: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{size}-{attempt}-")
        processes = start_ranks(zygote, *[["worker", str(corpus), str(folder)]] * size)
        assert ended(processes) == [0] * size, [process.err for process in processes]
        return folder

    results = {}
    texts = tmp_path_factory.mktemp("texts")
    corpus = write_text(texts / "toy.txt", LINES)
    write_text(texts / "toy.tsv", [f"{line}\t{line.split()[1]}" for line in LINES])
    sizes = {name: value for name, value in SIZES.items() if name not in ("diffusion_steps", "objective")}
    teacher: dict[str, Any] = {"objective": "cross_entropy", **sizes}
    run = texts / "teacher"
    assert train.main(flags(dataset=corpus, checkpoint_path=run, steps=40, lr=1e-2, warmup_steps=0, **teacher)) == 0
    shutil.copy(run / "model000040.pt", texts / "toy.pt")
    for size in (1, 2, 4):
        folder = unless_crashed(partial(work, size))
        results[size] = torch.load(folder / "found.pt", weights_only=True)
    return results


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_do_what_one_does(case: str, size: int, found: dict[int, Found]) -> None:
    several, one = found[size][case], found[1][case]
    assert difference(several["grad"], one["grad"]) < 1e-6
    assert difference(several["losses"], one["losses"]) < 1e-5
    assert several["losses"].shape == one["losses"].shape
    for name in ("weights", "averages", "by t"):
        assert difference(several[name], one[name]) < 1e-4, name
    assert several["sentences"] == one["sentences"]
    assert several["validation"] == pytest.approx(one["validation"], rel=1e-4)
    if case == "student":
        torch.testing.assert_close(several["noises"], one["noises"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_fsdp_is_ddp(size: int, found: dict[int, Found]) -> None:
    """After 50 steps; and each rank holds its share of parameters and moments only."""
    ddp, fsdp = found[size]["ddp"], found[size]["fsdp"]
    for name in ("grad", "weights", "averages", "losses"):
        assert difference(fsdp[name], ddp[name]) < 1e-6, name
    assert fsdp["held"] < 1.2 * ddp["held"] / size


def test_ranks_draw_different_noise(found: dict[int, Found]) -> None:
    """The losses of the two halves of the batch are not those of one half twice."""
    first, second = found[2]["ddp"]["losses"][0].chunk(2)
    assert not torch.allclose(first, second)
    assert found[4]["second moment"]["by t"].sum() > 0
