"""`nans`: where the first NaN comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fdl._compiler._nans import watching


@contextmanager
def nans() -> Iterator[None]:
    """Raise a FloatingPointError where a jitted function makes a NaN or inf, as `jax_debug_nans`.

    Inside the `with` block the results of each call of a jitted function are checked. If one of
    them has a NaN or inf and no argument has, the function runs again eagerly, step by step, to
    find the first operation that makes one. The error names it, the line of your program, the step
    of the `scan` and the result. Arguments to donate are copied, and stay valid.

    >>> import torch
    >>> from fdl import disable_jit, jit
    >>> fn = jit(lambda x: {"y": x.log()})
    >>> with nans(), disable_jit():                 # eager functions are not checked
    ...     fn(torch.tensor(-1.0))
    {'y': tensor(nan)}
    """
    token = watching.set(True)
    try:
        yield
    finally:
        watching.reset(token)
