"""Let Inductor's kernels run on several threads only where that takes less time.

Inductor starts threads for 512 numbers each. Starting them takes a few microseconds, in which one
thread computes a simple function of ten thousand numbers, and far longer if another process uses
the processors.
"""

from __future__ import annotations

import re
from functools import cache, wraps
from typing import Any

DEFAULT_CHUNK = 512
WORTH_A_THREAD = 1 << 17  # operations on single numbers: about four microseconds of vectors
SLOW = re.compile(r"\b(exp|log|sin|cos|tan|sinh|cosh|tanh|erf|pow|gamma|sqrt|std::\w+)\w*\(| / ")
FACTOR = 8  # a slow operation, and an operation that is not vectorized, count as so many


def chunk_size(kernels: list[Any]) -> int:
    """Return for how many numbers a thread is worth starting, by the code for each of them."""
    kernel = kernels[0]  # the main loop; others compute what is left over
    parts = (kernel.loads, kernel.compute, kernel.stores)
    lines = [line for part in parts for line in part.getvalue().splitlines()]
    work = len(lines) + FACTOR * sum(len(SLOW.findall(line)) for line in lines)
    if "Vec" not in type(kernel).__name__ and "Tile" not in type(kernel).__name__:
        work *= FACTOR
    return max(DEFAULT_CHUNK, WORTH_A_THREAD // max(work, 1))


@cache
def start_fewer_threads() -> None:
    """Let Inductor estimate the work of a kernel before it divides it among threads."""
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppKernel

    decide = CppKernel.decide_parallel_depth

    @wraps(decide)
    def decide_parallel_depth(self: Any, *args: Any) -> Any:
        kernels = getattr(self, "kernels", None)
        if not kernels or config.cpp.min_chunk_size != DEFAULT_CHUNK:  # set by the user
            return decide(self, *args)
        with config.patch({"cpp.min_chunk_size": chunk_size(kernels)}):
            return decide(self, *args)

    CppKernel.decide_parallel_depth = decide_parallel_depth  # type: ignore[method-assign]
