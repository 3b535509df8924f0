"""Let the memory of intermediate results stay with the process.

A program takes the same memory at every call. glibc returns large pieces to the system each time
and fetches them again page by page, which takes up to half of the time of a call.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 1 << 25  # bytes of a piece that stays: the most that glibc accepts
MOST = 1 << 30  # bytes that stay


@cache
def keep_memory() -> None:
    """Tell glibc so, once in a process, unless the user has told it something else."""
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"}
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or not own.isdisjoint(os.environ) or "glibc.malloc" in tunables:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, MOST)
