"""`callback` and `print`: run Python code with the values of a program that runs."""

from __future__ import annotations

import builtins
import string
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._checks import check_function, describe
from fdl._compiler._callbacks import call_back

VALUE = object()  # stands for a tensor


def callback(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call `fn(*args, **kwargs)` with the values of tensors, eagerly and in a program that runs.

    Equals `jax.debug.callback(fn, *args, ordered=True)`. In a jitted function `fn` is called each
    time the program gets there: in a `scan` once a step, in order. It is called after the values
    have been computed and before the program goes on, so it may show progress, and it may raise,
    which ends the program. Under `vmap` it is called for each member, under `grad` with the
    values of the forward pass. Inside `torch.compile` it is not called.

    On CUDA a program with a callback runs without a CUDA graph.

    Args:
        fn: a function; its result is ignored.
        args: trees; tensors in them are passed with their values, everything else as it is while
            tracing.
        kwargs: likewise.

    Raises:
        TypeError: `fn` is not a function.

    >>> from fdl import scan
    >>> seen = []
    >>> def step(total, x):
    ...     callback(lambda x: seen.append(x.item()), x)
    ...     return total + x, ()
    >>> scan(step, torch.tensor(0), torch.arange(3))[0], seen
    (tensor(3), [0, 1, 2])
    """
    check_function("debug.callback", "fn", fn)
    if torch.compiler.is_compiling():
        return
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    fixed = [VALUE if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # keeps no tensor

    def call(values: list[Tensor]) -> None:
        rest = iter(values)
        filled = [next(rest) if leaf is VALUE else leaf for leaf in fixed]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        fn(*args, **kwargs)

    call_back(call, values)


def print(fmt: str, *args: Any, **kwargs: Any) -> None:
    """Print `fmt.format(*args, **kwargs)` with the values of tensors, as `jax.debug.print` does.

    When and how often is said at `callback`: in a jitted function at each run, in a `scan` at each
    step. (Python's `print` runs once, while the function is traced, when there are no values.)

    Args:
        fmt: a format string.
        args: what `{}` in it stands for.
        kwargs: what `{name}` in it stands for.

    Raises:
        IndexError: `fmt` asks for a position that `args` does not have.
        KeyError: `fmt` asks for a name that `kwargs` does not have.
        TypeError: `fmt` is not a string.

    >>> loss = torch.tensor(0.25)
    >>> print("step {}: loss {loss:.3f}", torch.tensor(7), loss=loss)
    step 7: loss 0.250
    """
    if not isinstance(fmt, str):
        raise TypeError(
            f"debug.print: fmt must be a format string such as 'x = {{}}', got {describe(fmt)}"
        )
    if torch.compiler.is_compiling():
        return
    blank = _Blank()
    string.Formatter().vformat(fmt, [blank] * len(args), dict.fromkeys(kwargs, blank))
    callback(lambda *args, **kwargs: builtins.print(fmt.format(*args, **kwargs)), *args, **kwargs)


class _Blank:
    """Stands for a value while a format string is checked."""

    def __getattr__(self, name: str) -> _Blank:
        return self

    def __getitem__(self, index: Any) -> _Blank:
        return self

    def __format__(self, spec: str) -> str:
        return ""
