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


class Accepting:
    """An automaton, ready to be asked about batches of word distributions."""

    def __init__(self, automaton: Automaton, cls_id: int, device: torch.device | str = "cpu") -> None:
        self.cls_id, self.states = cls_id, automaton.states
        self.source, self.target, self.emits = (
            torch.as_tensor(part, device=device) for part in (automaton.source, automaton.target, automaton.emits)
        )
        sets = torch.as_tensor(automaton.sets, device=device)
        single = sets.sum(dim=1) == 1
        # Sets of one token, which are most, are looked up; the others are summed over.
        self.single, self.large = single.nonzero().flatten(), (~single).nonzero().flatten()
        self.tokens, self.masks = sets[single].int().argmax(dim=1), sets[~single]

    @torch.no_grad()
    def posterior(self, log_p: Tensor) -> Tensor:
        """p(w_l = v | accepted), (B, L, V) -> (B, L, V)."""
        B, L, _ = log_p.shape
        of_set = self._of_sets(log_p, torch.logsumexp)  # (B, L, K)
        emitted = of_set[:, :, self.emits]  # (B, L, E)
        alpha = self._start(log_p)
        alphas = [alpha]
        for position in range(1, L):
            alpha = self._gather(alpha[:, self.source] + emitted[:, position], self.target)
            alphas.append(alpha)
        beta = torch.full_like(alpha, -torch.inf)
        beta[:, -1] = 0.0
        p = torch.zeros_like(log_p)
        p[:, 0, self.cls_id] = 1.0
        for position in range(L - 1, 0, -1):
            path = alphas[position - 1][:, self.source] + emitted[:, position] + beta[:, self.target]  # (B, E)
            edge = (path - path.logsumexp(dim=1, keepdim=True)).exp()
            share = path.new_zeros(B, of_set.shape[2]).index_add_(1, self.emits, edge)  # P(a token of the set)
            p[:, position] = self._spread(share, log_p[:, position], of_set[:, position])
            beta = self._gather(emitted[:, position] + beta[:, self.target], self.source)
        return p

    def best(self, log_p: Tensor) -> Tensor:
        """The most probable sentence that is accepted, (B, L, V) -> (B, L) int64 (Viterbi)."""
        L = log_p.shape[1]
        emitted = self._of_sets(log_p, torch.amax)[:, :, self.emits]
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
            ids[:, position] = self._likeliest(log_p[:, position], self.emits[edge])
            state = self.source[edge]
        return ids

    def _start(self, log_p: Tensor) -> Tensor:
        start = log_p.new_full((len(log_p), self.states), -torch.inf)
        start[:, 0] = 0.0  # after [CLS]
        return start

    def _of_sets(self, log_p: Tensor, reduce: Reduce) -> Tensor:
        """log P of each set of tokens, or of the most probable token in it, (B, L, V) -> (B, L, K)."""
        out = log_p.new_empty(*log_p.shape[:2], len(self.single) + len(self.large))
        out[:, :, self.single] = log_p[:, :, self.tokens]
        for k, mask in zip(self.large.tolist(), self.masks, strict=True):
            out[:, :, k] = reduce(log_p[:, :, mask], -1)
        return out

    def _spread(self, share: Tensor, log_p: Tensor, of_set: Tensor) -> Tensor:
        """The share of each set (B, K), given to its tokens in proportion to their p: (B, V)."""
        p = torch.zeros_like(log_p).index_add_(1, self.tokens, share[:, self.single])
        for k, mask in zip(self.large.tolist(), self.masks, strict=True):
            p[:, mask] += share[:, k, None] * (log_p[:, mask] - of_set[:, k, None]).exp()
        return p

    def _likeliest(self, log_p: Tensor, number: Tensor) -> Tensor:
        """The most probable token of a set, by number, for each sentence: (B, V), (B,) -> (B,)."""
        token_of = torch.zeros(len(self.single) + len(self.large), dtype=torch.int64, device=number.device)
        token_of[self.single] = self.tokens
        tokens = token_of[number]
        for k, mask in zip(self.large.tolist(), self.masks, strict=True):
            rows = number == k
            tokens[rows] = log_p[rows].masked_fill(~mask, -torch.inf).argmax(dim=1)
        return tokens

    def _gather(self, path: Tensor, to: Tensor) -> Tensor:
        """log-sum-exp of the edges that meet in each state, (B, E) -> (B, S)."""
        most = self._largest(path, to)
        shift = most.clamp(min=torch.finfo(path.dtype).min)
        total = torch.zeros_like(most).index_add_(1, to, (path - shift[:, to]).exp())
        return total.log() + shift

    def _largest(self, path: Tensor, to: Tensor) -> Tensor:
        most = path.new_full((len(path), self.states), -torch.inf)
        return most.scatter_reduce(1, to.expand_as(path), path, "amax")
