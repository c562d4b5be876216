"""Demands on words: the automaton, its posterior and its probability, against enumeration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from text_diffusion.control import Avoid, Control, Length, Template, Want
from text_diffusion.control.automaton import Builder
from text_diffusion.control.controls import gather
from text_diffusion.control.posterior import Accepting
from text_diffusion.control.steering import Seen, Steered, reweighted
from text_diffusion.control.vocabulary import Vocabulary
from text_diffusion.cross_entropy import WordDenoiser
from text_diffusion.gaussian_diffusion import GaussianDiffusion
from text_diffusion.schedules import named_betas
from text_diffusion.tokenizer import Tokenizer, train_word_level

L = 6

# Small enough to list every sequence of tokens: [CLS] and five of "a", "b", "c" after a space, ".", [SEP], [PAD].


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_word_level(["a b c."])


def all_sentences(tokenizer: Tokenizer) -> tuple[Tensor, list[str]]:
    """Every sequence [CLS] w_1 ... w_n [SEP] [PAD] ... of L tokens, n >= 1, and its text."""
    words = [i for i in range(tokenizer.vocab_size) if tokenizer.decode_all([i])]
    rows = []
    for n in range(1, L - 1):
        for middle in product(words, repeat=n):
            rows.append([tokenizer.cls_id, *middle, tokenizer.sep_id, *[tokenizer.pad_id] * (L - 2 - n)])
    return torch.tensor(rows), [tokenizer.decode(row) for row in rows]


CASES: dict[str, tuple[list[Control], Callable[[str], Any]]] = {
    "gap": ([Template("a [GAP] c")], re.compile(r"a \S.* c").fullmatch),
    "fixed gap": ([Template("[GAP:2] c")], re.compile(r"\S+ \S+ c").fullmatch),
    "range": ([Template("b [GAP:0-1]")], re.compile(r"b( \S+)?").fullmatch),
    "open range": ([Template("[GAP:2-] b")], re.compile(r"(\S+ ){2,}b").fullmatch),
    "glued after": ([Template("[GAP].")], re.compile(r"(?!\.$)\S.*\.").fullmatch),
    "glued before": ([Template("a[GAP:1]")], re.compile(r"a\.+").fullmatch),
    "known only": ([Template("a b")], re.compile(r"a b").fullmatch),
    "two gaps": ([Template("[GAP] b [GAP]")], re.compile(r"\S.* b .*\S").fullmatch),
    "length": ([Length(2, 2)], lambda text: len(text.split()) == 2),
    "length range": ([Length(2, 3)], lambda text: 2 <= len(text.split()) <= 3),
    "at least": ([Length(3, None)], lambda text: len(text.split()) >= 3),
    "want": ([Want("b")], lambda text: any(word.rstrip(".") == "b" for word in text.split())),
    "want a phrase": ([Want("b a")], re.compile(r"(.* )?b a(\.* .*|\.*)").fullmatch),
    "want what a template has": (
        [Template("a [GAP] c"), Want("a b")],
        lambda text: re.fullmatch(r"a \S.* c", text) and re.search(r"(^| )a b\.* ", text),
    ),
    "want a phrase at both ends": ([Template("[GAP:1] b"), Want("a b")], re.compile(r"a b").fullmatch),
    "want phrases that share a word": (
        [Want("a b"), Want("b c")],
        re.compile(r"(.* )?(a b c(\.* .*|\.*)|a b[. ].*b c(\.* .*|\.*)|b c[. ].*a b(\.* .*|\.*))").fullmatch,
    ),
    "want twice": ([Want("b"), Want("b", 2)], re.compile(r"\S+ b\.*( .*)?").fullmatch),
    "want what begins again within itself": ([Want("a a b")], re.compile(r"(.* )?a a b(\.* .*|\.*)").fullmatch),
    "want the same word twice": ([Want("b b")], re.compile(r"(.* )?b b(\.* .*|\.*)").fullmatch),
    "want at": ([Want("b", 2)], re.compile(r"\S+ b\.*( .*)?").fullmatch),
    "want two": ([Want("a"), Want("c")], lambda text: {"a", "c"} <= {word.rstrip(".") for word in text.split()}),
    "avoid": ([Avoid("b")], lambda text: "b" not in text),
    "avoid at": ([Avoid("b", 1)], re.compile(r"[^b].*").fullmatch),
    "together": (
        [Template("a [GAP]"), Length(3, 3), Want("c"), Avoid("b")],
        lambda text: (
            len(text.split()) == 3
            and text.startswith("a ")
            and "b" not in text
            and "c" in [word.rstrip(".") for word in text.split()]
        ),
    ),
}
AMBIGUOUS = ("two gaps", "want a phrase", "glued after")  # accepted in several ways, which count severally


def accepting(tokenizer: Tokenizer, controls: list[Control]) -> Accepting:
    vocabulary = Vocabulary(tokenizer)
    demands, _ = gather(controls, vocabulary, L)
    return Accepting(Builder(demands, vocabulary).build(), tokenizer.cls_id)


@pytest.mark.parametrize("name", list(CASES))
def test_posterior_against_enumeration(name: str, small: Tokenizer) -> None:
    """p(w_l = v | accepted) is the sum over the sentences that an independent test accepts."""
    controls, is_accepted = CASES[name]
    ids, texts = all_sentences(small)
    chosen = torch.tensor([bool(is_accepted(text)) for text in texts])
    torch.manual_seed(0)
    log_p = (2 * torch.randn(3, L, small.vocab_size)).log_softmax(dim=-1)
    log_p[..., small.backend.get_vocab()["."]] -= 1.0
    automaton = accepting(small, controls)
    log_p.requires_grad_()
    weight = log_p[:, torch.arange(1, L), ids[:, 1:]].sum(dim=-1).masked_fill(~chosen, -torch.inf)  # (3, N)
    best = ids[weight.argmax(dim=1)]
    assert torch.equal(automaton.best(log_p), best)
    if name in AMBIGUOUS:
        return
    share = weight.softmax(dim=1)
    expected = torch.zeros_like(log_p)
    for position in range(L):
        expected[:, position].index_add_(1, ids[:, position], share)
    torch.testing.assert_close(automaton.posterior(log_p), expected, rtol=1e-4, atol=1e-6)
    log_Z = weight.logsumexp(dim=1)
    assert log_Z.requires_grad, "the derivative of log Z by log p is the posterior too"
    (gradient,) = torch.autograd.grad(log_Z.sum(), log_p)
    torch.testing.assert_close(gradient[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(CASES))
def test_posterior_is_a_distribution(name: str, small: Tokenizer) -> None:
    """Also where what is demanded is next to impossible: in float32, at probabilities of e^-200 a token."""
    torch.manual_seed(1)
    log_p = (200 * torch.randn(4, L, small.vocab_size)).log_softmax(dim=-1)
    p = accepting(small, CASES[name][0]).posterior(log_p)
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(4, L), rtol=1e-3, atol=1e-4)
    assert bool((p >= 0).all())


def test_words_that_change_nothing_change_nothing() -> None:
    torch.manual_seed(2)
    x, p, embeds = torch.randn(2, 3, 4), torch.rand(2, 3, 7).softmax(dim=-1), torch.randn(7, 4)
    torch.testing.assert_close(reweighted(x, p, p, embeds), x)
    certain = torch.eye(7)[torch.tensor([[0, 1, 2], [3, 4, 5]])]
    far = reweighted(x, (1 - certain) / 6, certain, embeds)
    torch.testing.assert_close(far, certain @ embeds)


# Sentences of two words, known exactly: what one word means for the other

WORDS = 3


class ExactWords(WordDenoiser):
    """What a network would be that had learned a language of [CLS] w_1 w_2 [SEP] perfectly."""

    def __init__(self, tokenizer: Tokenizer, process: GaussianDiffusion) -> None:
        torch.nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(0)
        self.E = torch.randn(tokenizer.vocab_size, 3, generator=generator, dtype=torch.float64)
        noise = torch.randn(WORDS, WORDS, generator=generator, dtype=torch.float64)
        self.p = (3 * torch.eye(WORDS) + 0.5 * noise).flatten().softmax(0)  # a word is often followed by itself
        words = Vocabulary(tokenizer).starts.nonzero()[0].tolist()
        self.ids = torch.tensor([[tokenizer.cls_id, a, b, tokenizer.sep_id] for a, b in product(words, repeat=2)])
        self.process = process

    @property
    def embeddings(self) -> Tensor:
        return self.E

    def given(self, x_t: Tensor, s: int, which: Tensor | None = None) -> Tensor:
        """p(sentence | x_t), (B, N), of all sentences or some."""
        abar = float(self.process.alphas_cumprod[s])
        distance = (x_t[:, None] - math.sqrt(abar) * self.E[self.ids]).square().sum(dim=(2, 3))
        log_p = self.p.log() - distance / (2 * (1 - abar))
        return (log_p if which is None else log_p.masked_fill(~which, -torch.inf)).softmax(dim=1)

    def mean(self, p: Tensor) -> Tensor:
        """E[x_0], (B, L, D), of sentences so distributed."""
        return torch.einsum("bn,nld->bld", p, self.E[self.ids])

    def log_probs(
        self, x_t: Tensor, timesteps: Tensor, x_self: Tensor | None = None, *, condition: Tensor | None = None
    ) -> Tensor:
        s = round(float(timesteps[0]) / self.process.time_scale)
        one_hot = torch.nn.functional.one_hot(self.ids, len(self.E)).double()  # (N, L, V)
        return torch.einsum("bn,nlv->blv", self.given(x_t, s), one_hot).clamp(min=1e-300).log()


@pytest.mark.parametrize("s", [1, 10, 50, 80, 95])
def test_one_known_word_is_exact(s: int, small: Tokenizer) -> None:
    """E[x_0 | x_t, w_1] at both places: the known one by its word, the gap by the gradient."""
    process = GaussianDiffusion(named_betas("sqrt", 100))
    model = ExactWords(small, process)
    vocabulary = Vocabulary(small)
    word = small.decode_all([int(model.ids[0, 1])]).strip()
    demands, _ = gather([Template(f"{word} [GAP:1]")], vocabulary, 4)
    accepting = Accepting(Builder(demands, vocabulary).build(), small.cls_id)

    def denoise(x: Tensor, t: Tensor, previous: Tensor | None) -> Tensor:
        return model.mean(model.given(x, int(t[0])))

    network = SimpleNamespace(model=model, log_probs=model.log_probs)
    steered = Steered(denoise, network, process, (), accepting)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(s)
    x_t = process.q_sample(
        model.E[model.ids], torch.full((WORDS**2,), s), torch.randn(WORDS**2, 4, 3, generator=generator).double()
    )
    expected = model.mean(model.given(x_t, s, model.ids[:, 1] == model.ids[0, 1]))
    found = steered(x_t, torch.full((WORDS**2,), s), None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    without = denoise(x_t, torch.full((WORDS**2,), s), None)
    if s > 1:
        assert float((without - expected)[:, 2].abs().max()) > 0.1, "the words depend on each other"


def test_words_are_as_warm_as_sampling_is(small: Tokenizer) -> None:
    """p^(1 / temperature), made to sum to one."""
    process = GaussianDiffusion(named_betas("sqrt", 100))
    model = ExactWords(small, process)
    network = SimpleNamespace(model=model, log_probs=model.log_probs)
    x_t, t = model.E[model.ids], torch.full((WORDS**2,), 60)
    usual, cold = (
        Seen(Steered(lambda x, t, p: x, network, process, temperature=heat), x_t, t, None).log_p  # type: ignore[arg-type]
        for heat in (1.0, 0.5)
    )
    torch.testing.assert_close(cold.exp(), usual.exp() ** 2 / (usual.exp() ** 2).sum(dim=-1, keepdim=True))
    assert float((cold - usual).abs().max()) > 0.1
