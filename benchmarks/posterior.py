"""How far a model of words is from Bayes' rule, on a language that is known exactly, and where that costs sentences.

python benchmarks/posterior.py CKPT            weights trained on `animals` with --objective cross_entropy

With a known grammar p(w | x_t) can be computed: what each noisy embedding says of its word, times P(w), summed over all
sentences by passing messages along the slots (Pearl 1988). First the cross-entropy of held-out lines by this posterior
and by the model, at several levels of noise; then sentences for which the posterior takes the model's place at some of
them. The tables go to docs/recipe.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import table
import torch
from common import ROOT, machine, record
from evaluation import exact
from quality import simple_figures
from torch import Tensor

from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.generation import load_diffusion
from text_diffusion.grammar import Grammar
from text_diffusion.likelihood import read_text
from text_diffusion.losses import Noise
from text_diffusion.memory import keep_freed_memory
from text_diffusion.schedules import log_snr_at
from text_diffusion.tokenizer import Tokenizer

LEVELS = (-1.0, -1.5, -2.0, -2.5, -3.0, -3.5, -4.0, -5.0, -7.0)  # of lambda, the log-SNR
NEVER = -1e9  # log of a probability of 0


class Posterior:
    """p(w | x_t) of a grammar each of whose words is a token.

    Args:
        grammar: of the language; all its sentences have L tokens.
        tokenizer: of the model.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self.grammar = grammar
        self.one = grammar.sample_ids(1, np.random.default_rng(0))
        self.sentence = torch.tensor(tokenizer.encode(grammar.decode(self.one))[0])  # outside the slots as all are
        self.places = [self._place(i, tokenizer) for i in range(len(grammar.places))]
        self.log_P = {
            name: torch.from_numpy(np.log(slot.probs, where=slot.probs > 0, out=np.full(slot.probs.shape, NEVER)))
            for name, slot in grammar.slots.items()
        }  # (words of the slot given, words)

    def _place(self, place: int, tokenizer: Tokenizer) -> tuple[int, Tensor]:
        """The position of a place of the template, and the ids of its words."""
        rows = self.one.repeat(len(self.grammar.slots[self.grammar.places[place]].words), axis=0)
        rows[:, place] = np.arange(len(rows))
        ids = torch.tensor(tokenizer.encode(self.grammar.decode(rows)))
        (position,) = (ids != ids[0]).any(dim=0).nonzero().flatten().tolist()
        return position, ids[:, position]

    def marginals(self, scores: Tensor) -> list[Tensor]:
        """log p of the words of each place, (N, words); from what the evidence adds to each word's score, (N, L, V)."""
        slots, up = self.grammar.slots, {name: torch.zeros(1, dtype=torch.float64) for name in self.grammar.slots}
        for name, (position, ids) in zip(self.grammar.places, self.places, strict=True):
            up[name] = up[name] + scores[:, position, ids].double()
        message: dict[str, Tensor] = {}
        for name, slot in reversed(slots.items()):
            if slot.given:
                message[name] = torch.logsumexp(self.log_P[name] + up[name][:, None], dim=2)
                up[slot.given] = up[slot.given] + message[name]
        log_p: dict[str, Tensor] = {}
        for name, slot in slots.items():
            down = self.log_P[name]  # (1, words)
            if slot.given:
                down = torch.logsumexp((log_p[slot.given] - message[name])[:, :, None] + down, dim=1)
            log_p[name] = (down + up[name]).log_softmax(dim=1)
        return [log_p[name] for name in self.grammar.places]

    def nll(self, scores: Tensor, input_ids: Tensor) -> Tensor:
        """-log p(w | x_t) of sentences w (N, L), in nats, of all their words together, (N,)."""
        total = torch.zeros(len(input_ids), dtype=torch.float64)
        for (position, ids), log_p in zip(self.places, self.marginals(scores), strict=True):
            right = input_ids[:, position, None] == ids
            total -= log_p[right]
        return total

    def x_start(self, scores: Tensor, E: Tensor) -> Tensor:
        """The mean of the words' embeddings (V, D), (N, L, D)."""
        x_start = E[self.sentence].repeat(len(scores), 1, 1)
        for (position, ids), log_p in zip(self.places, self.marginals(scores), strict=True):
            x_start[:, position] = log_p.exp().to(E.dtype) @ E[ids]
        return x_start


class Corrected(WordDenoiser):
    """A model with the exact posterior in its place where lambda is between two levels."""

    posterior: Posterior
    between: tuple[float, float]

    def forward(self, x_t: Tensor, timesteps: Tensor, *args: Any, **settings: Any) -> Tensor:
        """x_0, (B, L, D)."""
        low, high = self.between
        if low < float(log_snr_at(timesteps.float()).flatten()[0]) < high:
            E = self.embeddings
            return self.posterior.x_start(self.evidence(x_t, timesteps) @ E.T, E)
        return super().forward(x_t, timesteps, *args, **settings)


@torch.no_grad()
def gaps(weights: Path, posterior: Posterior, text: Path, lines: int) -> list[dict[str, float]]:
    """Nats a sentence by the posterior and by the model, at each level."""
    model = load_diffusion(str(weights), device="cpu")
    network = model.model
    assert isinstance(network, WordDenoiser)
    ids, E, T = read_text(text, model.tokenizer, model.sequence_len, lines).ids, network.embeddings, model.diffusion
    rows = []
    for level in LEVELS:
        t = int(np.abs(np.log(T.alphas_cumprod) - np.log1p(-T.alphas_cumprod) - level).argmin())
        at = torch.full((len(ids),), t)
        x_t = T.q_sample(
            network.get_embeds(ids), at, Noise.draw((5, t), 0, len(ids), (len(ids[0]), len(E[0])), ids.device).t
        )
        timesteps = T.network_time(at)
        first = network(x_t, timesteps)
        nll = network(x_t, timesteps, first, ids).sum(dim=1)
        best = posterior.nll(network.evidence(x_t, timesteps) @ E.T, ids)
        rows.append({"level": level, "exact": float(best.mean()), "model": float(nll.mean())})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def corrected(
    weights: Path, posterior: Posterior, calls: int, samples: int, between: tuple[float, float]
) -> dict[str, Any]:
    """Figures of sentences for which the posterior stands in between two levels."""
    model, task = load_diffusion(str(weights), device="cpu"), exact("animals")
    model.model.__class__ = Corrected
    assert isinstance(model.model, Corrected)
    assert task.grammar is not None
    model.model.posterior, model.model.between = posterior, between
    row = {"between": between, **simple_figures(model.sample(samples, steps=calls), task.grammar, task.train)}
    print(json.dumps(row), flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """One JSON line a row, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--lines", type=int, default=2000, help="held-out lines")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=32)
    args = parser.parse_args(argv)
    keep_freed_memory()
    model = load_diffusion(str(args.weights), device="cpu")
    if not isinstance(model.model, WordDenoiser):
        parser.error(f"expected weights of --objective cross_entropy, found others in {args.weights}")
    posterior = Posterior(Grammar.load(ROOT / "data/animals/grammar.json"), model.tokenizer)
    about = {"lines": args.lines, "samples": args.samples, "calls": args.calls, "machine": machine()}
    rows = gaps(args.weights, posterior, ROOT / "data/animals-test.txt", args.lines)
    far = 99.0  # beyond all levels
    where = ((far, far), (-far, -3.0), (-3.0, -2.0), (-2.0, -1.0), (-1.0, far), (-far, far))
    sampled = [corrected(args.weights, posterior, args.calls, args.samples, between) for between in where]
    record("posterior", about | {"levels": rows, "sampled": sampled})
    table.write()


if __name__ == "__main__":
    main()
