"""Ways to fill a gap in held-out descriptions: the program's, and those that others use, built here from its parts.

`replacement` (Lugmayr et al. 2022, arXiv 2201.09865, RePaint): at every level the known words are put into x_t with the
noise of that level; with R resamplings, each level is walked R times, forward again by fresh noise in between.
`gradient` (as Diffusion-LM's control, arXiv 2205.14217): guidance up log p of the known words. Both need to know how
many tokens the gap has, and are told; all have the same number of network calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from e2e_task import Task
from torch import Tensor

from text_diffusion.control import Scorer, Template
from text_diffusion.control.vocabulary import Vocabulary
from text_diffusion.errors import UserError
from text_diffusion.generation import TextDiffusion
from text_diffusion.spacing import spaced_timesteps

RESAMPLINGS = 5
STRENGTH = 20.0  # of `gradient`; below, fewer known words come out


@dataclass(frozen=True)
class Masked:
    """A line without its middle third: words before and behind it, and the same in tokens."""

    line: str
    before: list[str]
    behind: list[str]

    @staticmethod
    def of(line: str) -> Masked:
        """The middle is left out."""
        found = line.split()
        third = len(found) // 3
        return Masked(line, found[:third], found[len(found) - third :])

    def template(self, gap: str) -> str:
        """With a gap, such as "[GAP:{n}]"."""
        n = len(self.line.split()) - len(self.before) - len(self.behind)
        return " ".join([*self.before, gap.format(n=n), *self.behind])

    def tokens(self, model: TextDiffusion) -> tuple[Tensor, Tensor]:
        """The ids of the whole line, (L,), and which of them are known, (L,): all but those of the middle."""
        vocabulary, tokenizer = Vocabulary(model.tokenizer), model.tokenizer
        middle = self.line.split()[len(self.before) : len(self.line.split()) - len(self.behind)]
        parts = [
            vocabulary.spell(" ".join(words), first=first)[0]
            for words, first in ((self.before, True), (middle, not self.before), (self.behind, False))
        ]
        ids = [tokenizer.cls_id, *(i for part in parts for i in part), tokenizer.sep_id]
        if len(ids) > model.sequence_len or tokenizer.unk_id in ids:
            raise UserError("a word that no training line has, or more words than fit")
        embeds = model.model.get_embeds(torch.tensor([ids]))
        if model.model.get_logits(embeds)[0].argmax(dim=-1).tolist() != ids:
            raise UserError("a word so rare that the head takes it for another")
        known = torch.ones(model.sequence_len, dtype=torch.bool)
        known[1 + len(parts[0]) : 1 + len(parts[0]) + len(parts[1])] = False
        return torch.tensor(ids + [tokenizer.pad_id] * (model.sequence_len - len(ids))), known


Fill = Callable[[TextDiffusion, Masked, int, int], str]  # model, line, network calls, seed


def ours(gap: str, **settings: Any) -> Fill:
    """The program's: a template."""

    def fill(model: TextDiffusion, masked: Masked, calls: int, seed: int) -> str:
        return model.sample(1, steps=calls, controls=[Template(masked.template(gap))], seed=seed, **settings)[0]

    return fill


def replacement(resamplings: int) -> Fill:
    """Known words put into every x_t, each level walked so many times."""

    @torch.no_grad()
    def fill(model: TextDiffusion, masked: Masked, calls: int, seed: int) -> str:
        ids, known = masked.tokens(model)
        full = model.diffusion
        process = full.respace(spaced_timesteps(full.alphas_cumprod, max(calls // resamplings, 1)))
        generator = torch.Generator().manual_seed(seed)
        clean = model.model.get_embeds(ids[None])

        def noise() -> Tensor:
            return torch.randn(clean.shape, generator=generator)

        x_t = noise()
        pred_xstart: Tensor | None = None
        for s in reversed(range(process.num_timesteps)):
            t = torch.tensor([s])
            for again in range(resamplings):
                x_t = torch.where(known[:, None], process.q_sample(clean, t, noise()), x_t)
                pred_xstart = model.model(x_t, process.network_time(t), pred_xstart)
                if s == 0:
                    break
                x_s = process.p_mean_variance(pred_xstart, x_t, t).sample(noise())
                beta = float(process.betas[s])
                x_t = (1 - beta) ** 0.5 * x_s + beta**0.5 * noise() if again + 1 < resamplings else x_s
        assert pred_xstart is not None, "there is a level"
        found = model.model.get_logits(pred_xstart).argmax(dim=-1)[0]
        return model.tokenizer.decode(torch.where(known, ids, found).tolist())

    return fill


def gradient(model: TextDiffusion, masked: Masked, calls: int, seed: int) -> str:
    """Guidance up the log probability of the known words; what they are in the end is up to the model."""
    ids, known = masked.tokens(model)
    places = known.nonzero().flatten()
    scorer = Scorer(lambda log_p: log_p[:, places, ids[places]].sum(dim=1), STRENGTH)
    return model.sample(1, steps=calls, controls=[scorer], seed=seed)[0]


WAYS: dict[str, Fill] = {
    "`[GAP:n]`": ours("[GAP:{n}]"),
    "`[GAP]`": ours("[GAP]"),
    "`[GAP:n]`, `--sampler ancestral`": ours("[GAP:{n}]", sampler="ancestral"),
    "replacement": replacement(1),
    f"replacement, {RESAMPLINGS} times a level": replacement(RESAMPLINGS),
    f"gradient, strength {STRENGTH:g}": gradient,
}


def measure(task: Task, model: TextDiffusion, samples: int, calls: int, ways: Sequence[str] = tuple(WAYS)) -> Any:
    """Of each way: known words kept, triples at the gap that the other half of the held-out part has too."""
    here, elsewhere = task.halves()
    known = task.known([row.line for row in elsewhere])
    rows = []
    for way in ways:
        kept, shares, people, refused, seconds = 0, list[bool](), list[bool](), 0, 0.0
        pairs: list[tuple[str, str]] = []
        for number in np.random.default_rng(0).permutation(len(here)):
            masked = Masked.of(here[number].line)
            try:
                masked.tokens(model)
            except UserError:
                refused += 1
                continue
            started = time.perf_counter()
            filled = WAYS[way](model, masked, calls, int(number))
            seconds += time.perf_counter() - started
            found, before, behind = filled.split(), len(masked.before), len(masked.behind)
            kept += found[:before] == masked.before and found[len(found) - behind :] == masked.behind
            shares += [triple in known for triple in task.touching(found, before, behind)]
            people += [triple in known for triple in task.touching(masked.line.split(), before, behind)]
            pairs.append((masked.template("[GAP:{n}]"), filled))
            if len(pairs) == samples:
                break
        rows.append(
            {
                "gap": way,
                "samples": len(pairs),
                "refused": refused,
                "kept": kept / len(pairs),
                "triples": sum(shares) / len(shares),
                "people": sum(people) / len(people),
                "ms": 1000 * seconds / len(pairs),
                "examples": pairs[:5],
            }
        )
        print(rows[-1], flush=True)
    return {"calls": calls, "rows": rows}
