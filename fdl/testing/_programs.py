"""Count the programs that `jit` builds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fdl._compiler._routes import about_to_build


@dataclass
class Programs:
    """What `count_programs` counts.

    >>> Programs().count
    0
    """

    count: int = 0  # of programs built since the block began


@contextmanager
def count_programs() -> Iterator[Programs]:
    """Count the programs that `jit` builds in a block, on all threads.

    A program is built for each new signature (structure, shapes, dtypes) of each jitted function,
    also if the compiled code then comes from the cache on the disk. A loop that should compile once
    and does not, because it calls `jit` anew or its shapes change, shows here.

    >>> import torch
    >>> import fdl
    >>> double = fdl.jit(lambda x: 2 * x)
    >>> with count_programs() as programs:
    ...     for i in range(3):
    ...         y = double(torch.full((2,), float(i)))
    >>> programs.count
    1
    """
    programs = Programs()

    def count() -> None:
        programs.count += 1

    about_to_build.append(count)
    try:
        yield programs
    finally:
        about_to_build.remove(count)
