"""Integers whose differences are known while a function is traced: `i`, `i + 2`, `i * 8`."""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

WIDE = (torch.int64, torch.int32)  # narrower integers wrap around too early
SAME = ("to", "long", "int", "clone", "detach", "contiguous")


class Linear(NamedTuple):
    """A sum of unknown integers with constant factors, and a constant."""

    constant: int
    factors: dict[int, int]  # by the number of the unknown

    def plus(self, other: Linear, factor: int = 1) -> Linear:
        """Return `self + factor * other`."""
        unknowns = {**self.factors, **other.factors}
        sums = {u: self.factors.get(u, 0) + factor * other.factors.get(u, 0) for u in unknowns}
        factors = {unknown: total for unknown, total in sums.items() if total}
        return Linear(self.constant + factor * other.constant, factors)


class Counters:
    """The integer tensors of a trace as linear functions of each other."""

    def __init__(self) -> None:
        self.forms = WeakTensorKeyDictionary()
        self.reads: dict[tuple[Any, int], Linear] = {}  # x[k], by x and k
        self.unknown = count()

    def difference(self, x: int | Tensor, y: int | Tensor) -> int | None:
        """Return `x - y` if it does not depend on values of tensors, else None.

        >>> counters, i = Counters(), torch.tensor(5)
        >>> counters.note("add", (i, 2), end := i + 2)
        >>> counters.difference(end, i)
        2
        """
        difference = self._form(x).plus(self._form(y), -1)
        return None if difference.factors else difference.constant

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Record the result of a function if it is linear.

        Args:
            name: of the function, such as `"add"` or `"__rsub__"`.
            args: all its arguments.
            result: its result.
        """
        form = self._result(name.strip("_"), args) if is_counter(result) else None
        if form is not None:
            self.forms[result] = form

    def forget(self) -> None:
        """Forget everything: an integer tensor was changed in place, with all its views."""
        self.forms.clear()
        self.reads.clear()

    def _form(self, x: int | Tensor) -> Linear:
        if not isinstance(x, Tensor):
            return Linear(x, {})
        if x not in self.forms:
            self.forms[x] = Linear(0, {next(self.unknown): 1})
        return self.forms[x]

    def _result(self, name: str, args: tuple[Any, ...]) -> Linear | None:
        x, y = (*args, None, None)[:2]
        if name in SAME and is_counter(x):
            return self._form(x)
        if name == "neg":
            return Linear(0, {}).plus(self._form(x), -1)
        if name == "getitem" and type(y) is int:
            key = str(self._form(x)), y
            return self.reads.setdefault(key, Linear(0, {next(self.unknown): 1}))
        if len(args) != 2 or not all(isinstance(z, int) or is_counter(z) for z in args):
            return None
        if name in ("add", "radd"):
            return self._form(x).plus(self._form(y))
        if name in ("sub", "rsub"):
            x, y = (x, y) if name == "sub" else (y, x)
            return self._form(x).plus(self._form(y), -1)
        if name in ("mul", "rmul"):
            x, y = self._form(x), self._form(y)
            x, y = (x, y) if not y.factors else (y, x)
            return None if y.factors else Linear(0, {}).plus(x, y.constant)
        return None


def is_counter(x: Any) -> bool:
    """Check for a 0-d tensor of integers."""
    return isinstance(x, Tensor) and x.ndim == 0 and x.dtype in WIDE
