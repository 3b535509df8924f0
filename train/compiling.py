"""Announce that programs are compiled, before that is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fdl._compiler._routes import about_to_compile

__all__ = ["announced", "estimate"]


@contextmanager
def announced() -> Iterator[Callable[[], bool]]:
    """Print a line to stderr before the first program is compiled; programs on disk need none.

    Returns:
        A function that tells whether anything has been compiled so far.
    """
    compiled: list[int] = []

    def before(operations: int) -> None:
        if not compiled:
            print(f"compiling, about {estimate(operations)} s", file=sys.stderr, flush=True)
        compiled.append(operations)

    token = about_to_compile.set(before)
    try:
        yield lambda: bool(compiled)
    finally:
        about_to_compile.reset(token)


def estimate(operations: int) -> int:
    """Estimate the seconds in which a training program and its evaluation are compiled.

    >>> [estimate(n) for n in (50, 200, 1000)]
    [4, 6, 20]
    """
    seconds = 3 + operations / 60
    return round(seconds) if seconds < 10 else 5 * round(seconds / 5)
