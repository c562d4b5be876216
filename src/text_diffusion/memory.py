"""Memory: what is freed is kept for the next step; what does not fit is tried again in smaller batches."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from text_diffusion.errors import UserError

T = TypeVar("T")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> None:
    """Let glibc's allocator serve large tensors from its heap and never shrink it.

    By default every tensor above some 32 MB is mapped anew, zeroed by the kernel a page at a time. Elsewhere than on
    glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library, without mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, PyTorch's CPU allocator, C++ around it, a GPU or its libraries say so."""
    said = ("can't allocate memory", "std::bad_alloc", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


def in_batches(n: int, size: int, make: Callable[[int, int], list[T]], first: int = 0) -> list[T]:
    """make(start, stop) for first..n-1 in batches of `size`, halved, with a warning, as often as memory runs out.

    Raises:
        UserError: it runs out with a single one.
    """
    made: list[T] = []
    while (start := first + len(made)) < n:
        stop = min(start + size, n)
        try:
            made += make(start, stop)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            tried = stop - start
            if tried == 1:
                raise UserError(
                    "expected memory for one sentence, found too little; choose a shorter SEQ_LEN"
                ) from None
            size = tried // 2
            print(f"warning: out of memory with {tried} sentences at once; going on with {size}", file=sys.stderr)
    return made
