"""A model that writes from left to right as a judge of other texts: how many bits each line costs it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch

from text_diffusion.autoregressive import AT_ONCE, Autoregressive, nlls
from text_diffusion.data import fit
from text_diffusion.errors import UserError
from text_diffusion.figures import Scorer
from text_diffusion.generation import load
from text_diffusion.metrics import Floats
from text_diffusion.ngrams import Ints


def load_teacher(path: str) -> Scorer:
    """The judge of a weights file that was trained with `--objective autoregressive`.

    Raises:
        UserError: the file is no such weights file.
    """
    writer = load(path, device="cpu")
    if not isinstance(writer, Autoregressive):
        raise UserError(
            f"{path}: expected a teacher, which writes left to right (trained with --objective autoregressive), found "
            "another model; `text-diffusion likelihood` has the bound of that"
        )
    return Teacher(writer)


class Teacher:
    """Takes lines, gives -log2 P of each and how many tokens that is of, the end of the line being one."""

    def __init__(self, writer: Autoregressive) -> None:
        self.writer = writer

    @torch.no_grad()
    def __call__(self, lines: Sequence[str]) -> tuple[Floats, Ints]:
        """Of a line that is too long for the teacher, both are of its beginning; pads cost nothing and do not count."""
        tokenizer, length = self.writer.tokenizer, self.writer.sequence_len
        encoded = tokenizer.encode(lines)
        unknown = tokenizer.unknown_share(encoded)
        if unknown > 0.01:
            print(
                f"warning: {unknown:.1%} of the words are unknown to the teacher, and count as [UNK]", file=sys.stderr
            )
        beginnings = [ids[:length] for ids in encoded]
        if cut := sum(len(ids) > length for ids in encoded):
            print(f"warning: of {cut} lines the teacher reads only the first {length - 1} tokens", file=sys.stderr)
        tokens: Ints = np.array([len(ids) - 1 for ids in beginnings], dtype=np.int64)
        ids = fit(beginnings, length, tokenizer, "error", "the text").to(self.writer.device)
        counted = torch.arange(length - 1, device=ids.device) < torch.from_numpy(tokens).to(ids.device)[:, None]
        parts = zip(torch.split(ids, AT_ONCE), torch.split(counted, AT_ONCE), strict=True)
        nats = torch.cat([(nlls(self.writer.model, part) * mask).sum(dim=1) for part, mask in parts])
        bits: Floats = nats.double().cpu().numpy() / math.log(2)
        return bits, tokens
