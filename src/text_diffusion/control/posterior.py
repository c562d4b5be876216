"""The distribution of words given that the sentence meets the demands: closed form, by the forward-backward algorithm.

Given x_t the denoiser has an opinion on each position, p(w_l = v | x_t), and none on how positions go together. Taking
them as independent, the distribution given that an automaton accepts the sentence follows exactly:

    p(w_l = v | x_t, accepted) = sum over edges that emit v of  alpha_l(source) p_l(v) beta_{l+1}(target) / Z

where Z = p(accepted | x_t). It is also the derivative of log Z by log p(w_l = v | x_t).

Shapes: log p (B, L, V); S states, E edges, K sets of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from text_diffusion.control.automaton import Automaton

Reduce = Callable[[Tensor, int], Tensor]


class Kinds:
    """Tokens that every set has all of or none of are of one kind, and are looked at together.

    A set is some kinds, of which there are few where the vocabulary is large. Shapes: C kinds.
    """

    def __init__(self, sets: Tensor) -> None:
        patterns, self.of_token = torch.unique(sets, dim=1, return_inverse=True)  # (K, C), (V,)
        sizes = self.of_token.bincount()
        order = sizes.argsort(descending=True)  # kinds of a single token come last
        self.of_token = order.argsort()[self.of_token]
        self.sets = patterns[:, order]
        self.tokens = self.of_token.argsort()
        self.sizes = [size for size in sizes[order].tolist() if size > 1]

    def reduced(self, log_p: Tensor, reduce: Reduce) -> Tensor:
        """log P of each kind, or of its most probable token, (..., V) -> (..., C)."""
        by_kind = log_p[..., self.tokens]
        *large, single = torch.split(by_kind, [*self.sizes, by_kind.shape[-1] - sum(self.sizes)], dim=-1)
        return torch.cat([*(reduce(part, -1).unsqueeze(-1) for part in large), single], dim=-1)

    def spread(self, share: Tensor, log_p: Tensor, of_kind: Tensor) -> Tensor:
        """The share of each kind (..., C), given to its tokens in proportion to their p, (..., V)."""
        return (log_p + (share.log() - of_kind)[..., self.of_token]).exp()

    def likeliest(self, kind: Tensor, log_p: Tensor) -> Tensor:
        """The most probable token of a kind, (...), (..., V) -> (...)."""
        return log_p.masked_fill(self.of_token != kind.unsqueeze(-1), -torch.inf).argmax(dim=-1)


class Accepting:
    """An automaton, ready to be asked about batches of word distributions."""

    def __init__(self, automaton: Automaton, cls_id: int, device: torch.device | str = "cpu") -> None:
        self.cls_id, self.states = cls_id, automaton.states
        self.source, self.target, self.emits = (
            torch.as_tensor(part, device=device) for part in (automaton.source, automaton.target, automaton.emits)
        )
        self.kinds = Kinds(torch.as_tensor(automaton.sets, device=device))
        # Sets of one kind, which are most, are looked up; the others are summed over.
        sets = self.kinds.sets
        one = sets.sum(dim=1) == 1
        self.single, self.large = one.nonzero().flatten(), (~one).nonzero().flatten()
        self.alone, self.members = sets[one].int().argmax(dim=1), sets[~one]

    @torch.no_grad()
    def posterior(self, log_p: Tensor) -> Tensor:
        """p(w_l = v | accepted), (B, L, V) -> (B, L, V)."""
        B, L, _ = log_p.shape
        of_kind = self.kinds.reduced(log_p, torch.logsumexp)  # (B, L, C)
        of_set = self._of_sets(of_kind, torch.logsumexp)  # (B, L, K)
        emitted = of_set[:, :, self.emits]  # (B, L, E)
        alpha = self._start(log_p)
        alphas = [alpha]
        for position in range(1, L):
            alpha = self._gather(alpha[:, self.source] + emitted[:, position], self.target)
            alphas.append(alpha)
        beta = torch.full_like(alpha, -torch.inf)
        beta[:, -1] = 0.0
        shares = torch.zeros_like(of_kind)
        for position in range(L - 1, 0, -1):
            path = alphas[position - 1][:, self.source] + emitted[:, position] + beta[:, self.target]  # (B, E)
            edge = (path - path.logsumexp(dim=1, keepdim=True)).exp()
            share = path.new_zeros(B, of_set.shape[2]).index_add_(1, self.emits, edge)  # P(a token of the set)
            shares[:, position] = self._of_kinds(share, of_kind[:, position], of_set[:, position])
            beta = self._gather(emitted[:, position] + beta[:, self.target], self.source)
        p = self.kinds.spread(shares, log_p, of_kind)
        p[:, 0] = 0.0
        p[:, 0, self.cls_id] = 1.0
        return p

    def best(self, log_p: Tensor) -> Tensor:
        """The most probable sentence that is accepted, (B, L, V) -> (B, L) int64 (Viterbi)."""
        L = log_p.shape[1]
        of_kind = self.kinds.reduced(log_p, torch.amax)
        emitted = self._of_sets(of_kind, torch.amax)[:, :, self.emits]
        delta = self._start(log_p)
        deltas = [delta]
        for position in range(1, L):
            delta = self._largest(delta[:, self.source] + emitted[:, position], self.target)
            deltas.append(delta)
        ids = torch.full(log_p.shape[:2], self.cls_id, device=log_p.device)
        state = torch.full((len(log_p),), self.states - 1, device=log_p.device)
        for position in range(L - 1, 0, -1):
            path = deltas[position - 1][:, self.source] + emitted[:, position]
            edge = path.masked_fill(self.target != state[:, None], -torch.inf).argmax(dim=1)
            kind = self._likeliest(of_kind[:, position], self.emits[edge])
            ids[:, position] = self.kinds.likeliest(kind, log_p[:, position])
            state = self.source[edge]
        return ids

    def _start(self, log_p: Tensor) -> Tensor:
        start = log_p.new_full((len(log_p), self.states), -torch.inf)
        start[:, 0] = 0.0  # after [CLS]
        return start

    def _of_sets(self, of_kind: Tensor, reduce: Reduce) -> Tensor:
        """log P of each set, or of the most probable token in it, (B, L, C) -> (B, L, K)."""
        out = of_kind.new_empty(*of_kind.shape[:2], len(self.single) + len(self.large))
        out[:, :, self.single] = of_kind[:, :, self.alone]
        for k, kinds in zip(self.large.tolist(), self.members, strict=True):
            out[:, :, k] = reduce(of_kind[:, :, kinds], -1)
        return out

    def _of_kinds(self, share: Tensor, of_kind: Tensor, of_set: Tensor) -> Tensor:
        """The share of each set (B, K), given to its kinds in proportion to their P: (B, C)."""
        out = torch.zeros_like(of_kind).index_add_(1, self.alone, share[:, self.single])
        for k, kinds in zip(self.large.tolist(), self.members, strict=True):
            out[:, kinds] += share[:, k, None] * (of_kind[:, kinds] - of_set[:, k, None]).exp()
        return out

    def _likeliest(self, of_kind: Tensor, number: Tensor) -> Tensor:
        """The kind of the most probable token of a set, by number, for each sentence: (B, C), (B,) -> (B,)."""
        return of_kind.masked_fill(~self.kinds.sets[number], -torch.inf).argmax(dim=1)

    def _gather(self, path: Tensor, to: Tensor) -> Tensor:
        """log-sum-exp of the edges that meet in each state, (B, E) -> (B, S)."""
        most = self._largest(path, to)
        shift = most.clamp(min=torch.finfo(path.dtype).min)
        total = torch.zeros_like(most).index_add_(1, to, (path - shift[:, to]).exp())
        return total.log() + shift

    def _largest(self, path: Tensor, to: Tensor) -> Tensor:
        most = path.new_full((len(path), self.states), -torch.inf)
        return most.scatter_reduce(1, to.expand_as(path), path, "amax")
