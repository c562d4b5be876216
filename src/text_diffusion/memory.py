"""Memory that is freed is kept for the next step, instead of going back to the system and coming again page by page."""

from __future__ import annotations

import contextlib
import ctypes
import sys

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
