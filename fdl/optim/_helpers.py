"""Helpers that several optimizers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from fdl import tree
from fdl._modes import is_eager
from fdl.optim._base import apply_updates, map_grads
from fdl.optim._hyperparams import device_of
from fdl.tree import Tree

T = TypeVar("T")


def tree_where(flag: Tensor, new: T, old: T) -> T:
    """Select the new tree if a flag (bool []) is True, else the old one.

    >>> tree_where(torch.tensor(False), {"n": torch.tensor(1)}, {"n": torch.tensor(0)})
    {'n': tensor(0)}
    """
    return tree.map(lambda n, o: n if n is o else torch.where(flag, n, o), new, old)


def where_lazy(flag: Tensor, make_new: Callable[[], T], old: T) -> T:
    """Select `make_new()`, which an eager call computes only if the flag is True, or the old tree.

    >>> where_lazy(torch.tensor(False), lambda: (torch.zeros(1),), (torch.ones(1),))
    (tensor([1.]),)
    """
    if is_eager():
        return make_new() if flag else old
    return tree_where(flag, make_new(), old)


def zero_unless(flag: Tensor, grads: Tree) -> Tree:
    """Replace gradients by 0 unless a flag (bool []) is True; `None` stays.

    >>> zero_unless(torch.tensor(False), {"w": torch.ones(1), "frozen": None})
    {'w': tensor([0.]), 'frozen': None}
    """
    return map_grads(lambda g: torch.where(flag, g, 0.0), grads)


def check_whole(caller: str, name: str, value: int, least: int) -> None:
    """Raise unless an argument is an int of at least `least`.

    Args:
        caller: function to name in the message.
        name: name of the argument.
        value: its value.
        least: the smallest value allowed.

    >>> check_whole("accumulate", "k", 4, least=1)
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{caller}: {name} must be an int of at least {least}, got {value!r}")


def scalar(params: Tree, number: float, dtype: torch.dtype) -> Tensor:
    """Make a 0-d tensor on the device of the parameters.

    Args:
        params: the parameters.
        number: value of the tensor.
        dtype: dtype of the tensor.

    >>> scalar({"w": torch.ones(1)}, 0, torch.int64)
    tensor(0)
    """
    return torch.full((), number, dtype=dtype, device=device_of(params))


def as_value(caller: str, value: Any, like: Tensor, name: str = "value") -> Tensor:
    """Turn a number passed to an update into a float64 0-d tensor.

    Args:
        caller: function to name in the message.
        value: a number or a 0-d tensor.
        like: a tensor on the device to use.
        name: name of the argument.

    Raises:
        ValueError: `value` is a tensor with axes.

    >>> as_value("accumulate", 0.5, torch.zeros(()))
    tensor(0.5000, dtype=torch.float64)
    """
    scalar = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if scalar.ndim:
        raise ValueError(f"{caller}: {name} must be a scalar, got {list(scalar.shape)}")
    return scalar


def all_finite(grads: Tree, device: torch.device) -> Tensor:
    """Test if all gradients are finite (bool []); `None` counts as finite.

    >>> all_finite({"w": torch.tensor([1.0, torch.inf]), "frozen": None}, torch.device("cpu"))
    tensor(False)
    """
    flags = [torch.isfinite(g).all() for g in tree.leaves(grads) if g is not None]
    return reduce(torch.logical_and, flags, torch.ones((), dtype=torch.bool, device=device))


def stays_finite(params: Tree, updates: Tree, device: torch.device) -> Tensor:
    """Test if finite parameters stay finite when updated (bool []), each in its own dtype.

    >>> params = {"w": torch.tensor([6e4, torch.inf]).half()}
    >>> stays_finite(params, {"w": torch.tensor([1e4, 1.0])}, torch.device("cpu"))
    tensor(False)
    """
    return keeps_finite(params, apply_updates(params, updates), device)


def keeps_finite(old: Tree, new: Tree, device: torch.device) -> Tensor:
    """Test if each number that was finite still is (bool []).

    >>> old, cpu = {"w": torch.tensor([1.0, torch.inf])}, torch.device("cpu")
    >>> keeps_finite(old, {"w": torch.tensor([2.0, torch.nan])}, cpu)
    tensor(True)
    """
    spoiled = tree.map(lambda o, n: torch.isfinite(o) & ~torch.isfinite(n), old, new)
    flags = [~leaf.any() for leaf in tree.leaves(spoiled)]
    return reduce(torch.logical_and, flags, torch.ones((), dtype=torch.bool, device=device))


NO_SURPLUS = torch.zeros((), dtype=torch.float64)  # default of a field that old files lack


def weigh(count: Any, x: Tensor) -> Tensor:
    """Multiply a mean over `count` examples by their number; a count of None is 1.

    For a count of 0 the result is 0, even if x is NaN.

    >>> weigh(2, torch.ones(1)), weigh(0, torch.tensor([torch.nan]))
    (tensor([2.]), tensor([0.]))
    """
    if count is None:
        return x
    count = torch.as_tensor(count, dtype=x.dtype, device=x.device)
    return torch.where(count > 0, count * x, 0.0)


def surplus_of(caller: str, count: Any, like: Tensor) -> Tensor | float:
    """Return count − 1 (float64 []), by which the examples of an update exceed one.

    Args:
        caller: function to name in the message.
        count: a number or a 0-d tensor; None for 1.
        like: a tensor on the device to use.

    Raises:
        ValueError: `count` is a tensor with axes.

    >>> surplus_of("accumulate", 4, torch.zeros(()))
    tensor(3., dtype=torch.float64)
    """
    return 0.0 if count is None else as_value(caller, count, like, "count") - 1
