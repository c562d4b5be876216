"""Sentences in the making, step by step, each word with how probable the model holds it: what the players show.

Two views of a step: `noisy`, x_t rounded to the nearest words, and `guess`, the prediction of x_0 made from it. In both
a word's confidence is its probability under the tied head at the prediction of x_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from text_diffusion.calibration import probabilities
from text_diffusion.generation import TextDiffusion
from text_diffusion.tokenizer import Tokenizer
from text_diffusion.visible import visible

NOTHING = "·"  # where a special token stands


@dataclass(frozen=True)
class Word:
    """A word as it is shown, whether a space belongs before it, and its confidence, 0..1."""

    text: str
    space: bool
    confidence: float


@dataclass(frozen=True)
class Frame:
    """One step: its timestep, the share of noise in x_t, and the sentences in both views."""

    t: int
    noise: float
    noisy: list[list[Word]]
    guess: list[list[Word]]


def record(model: TextDiffusion, sentences: int, steps: int, seed: int) -> list[Frame]:
    """Sentences 0 .. sentences-1 of a seed; in the last frame both views are what the sampler returns."""
    spelling = Spelling(model.tokenizer)
    frames = []
    previous = None
    with torch.no_grad():
        for step in model.denoising(0, sentences, steps=steps, seed=seed):
            p = probabilities(model, step, previous)  # (B, L, V)
            previous = step.pred_xstart
            ids = model.model.get_logits(step.pred_xstart).argmax(dim=-1)  # (B, L)
            guess = spelling.lines(ids, p)
            noisy = spelling.lines(model.model.get_logits(step.x_t).argmax(dim=-1), p)
            noise = float((1 - model.diffusion.alphas_cumprod[step.t]) ** 0.5)
            frames.append(Frame(step.t, noise, noisy, guess))
    last = frames[-1]
    ended = spelling.sentences(ids, p)
    return [*frames[:-1], Frame(last.t, last.noise, ended, ended)]


class Spelling:
    """How a tokenizer's tokens look, one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.sep_id = tokenizer.sep_id
        self.special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id}
        ids = range(tokenizer.vocab_size)
        raw = [tokenizer.backend.id_to_token(i) or "" for i in ids]
        marked = any(token.startswith("Ġ") for token in raw)  # how a byte-level pre-tokenizer writes a space
        self.spaces = [token.startswith("Ġ") or not marked for token in raw]
        self.texts = [visible(tokenizer.decode_all([i]).strip()) or NOTHING for i in ids]

    def lines(self, ids: Tensor, probabilities: Tensor) -> list[list[Word]]:
        """Sentences of ids (B, L) with P (B, L, V); [CLS] is left out, as are special tokens at the end."""
        sure = probabilities.gather(2, ids[:, :, None]).squeeze(2).tolist()
        return [self._line(row, c) for row, c in zip(ids.tolist(), sure, strict=True)]

    def sentences(self, ids: Tensor, probabilities: Tensor) -> list[list[Word]]:
        """What `Tokenizer.decode` keeps of them: nothing after the first [SEP], and no special token before."""
        sure = probabilities.gather(2, ids[:, :, None]).squeeze(2).tolist()
        ends = [row.index(self.sep_id) if self.sep_id in row else len(row) for row in ids.tolist()]
        pairs = ([*zip(row, c, strict=True)][:end] for row, c, end in zip(ids.tolist(), sure, ends, strict=True))
        return [[self._word(i, c) for i, c in row if self.texts[i] != NOTHING] for row in pairs]

    def _line(self, ids: Sequence[int], confidence: Sequence[float]) -> list[Word]:
        words = [self._word(i, c) for i, c in zip(ids[1:], confidence[1:], strict=True)]
        while words and words[-1].text == NOTHING:
            words.pop()
        return words

    def _word(self, i: int, confidence: float) -> Word:
        return Word(NOTHING, True, confidence) if i in self.special else Word(self.texts[i], self.spaces[i], confidence)


def as_json(frames: Sequence[Frame]) -> dict[str, Any]:
    """For the page: words by number in a table, confidences in percent."""
    numbers: dict[tuple[str, bool], int] = {}

    def line(words: Sequence[Word]) -> list[int]:
        pairs = [(numbers.setdefault((w.text, w.space), len(numbers)), round(100 * w.confidence)) for w in words]
        return [number for pair in pairs for number in pair]

    shown = [
        {
            "t": frame.t,
            "noise": round(frame.noise, 4),
            "noisy": [line(words) for words in frame.noisy],
            "guess": [line(words) for words in frame.guess],
        }
        for frame in frames
    ]
    return {"words": [[text, int(space)] for text, space in numbers], "frames": shown}


def plain(words: Sequence[Word]) -> str:
    """A line as text."""
    return "".join((" " if word.space else "") + word.text for word in words).strip()
