"""Sentence embeddings by a small static model that comes inside its package, so that nothing is fetched (extra `eval`).

WordLlama (Miller 2024): the mean of 256-dimensional token vectors, distilled from a large language model. A mean does
not see the order of words: the figures made of it tell what is talked about, not whether the sentences are well formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def embed(lines: Sequence[str]) -> NDArray[np.float64]:
    """Lines to vectors of length 1, (n, 256); of a line without any token, 0.

    Raises:
        ImportError: the package is not installed.
    """
    model = _model()
    different, places = np.unique(np.array(lines, dtype=object), return_inverse=True)
    x = np.asarray(model.embed(different.tolist()), dtype=np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    unit: NDArray[np.float64] = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    return unit[places]


@cache
def _model() -> Any:
    import wordllama

    # Its tokenizer lies in a folder of the package where it only looks when told that this is its cache.
    package = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(cache_dir=package, disable_download=True)
