"""Helpers that several optimizers share."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl.optim._base import Optimizer, apply_updates, map_grads
from fdl.optim._basic import add_decayed_weights, scale
from fdl.optim._hyperparams import ScalarOrSchedule, check_rate, device_of, is_zero
from fdl.tree import Tree, Where


def keep(flag: Tensor, new: Tree, old: Tree) -> Tree:
    """Take the new tree where a flag (bool []) holds, and the old one where not.

    >>> keep(torch.tensor(False), {"n": torch.tensor(1)}, {"n": torch.tensor(0)})
    {'n': tensor(0)}
    """
    return tree.map(lambda n, o: torch.where(flag, n, o), new, old)


def zero_unless(flag: Tensor, grads: Tree) -> Tree:
    """Take gradients where a flag (bool []) holds, and 0 where not; `None` stays.

    >>> zero_unless(torch.tensor(False), {"w": torch.ones(1), "frozen": None})
    {'w': tensor([0.]), 'frozen': None}
    """
    return map_grads(lambda g: torch.where(flag, g, 0.0), grads)


def check_whole(caller: str, name: str, value: int, least: int) -> None:
    """Raise unless a number that is part of the program is a whole one, and large enough.

    Args:
        caller: opens the message.
        name: of the argument.
        value: what came.
        least: the smallest number allowed.

    >>> check_whole("accumulate", "k", 4, least=1)
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{caller}: {name} must be an int of at least {least}, got {value!r}")


def scalar(params: Tree, number: float, dtype: torch.dtype) -> Tensor:
    """Make a 0-d tensor on the device of the parameters.

    Args:
        params: what the state will belong to.
        number: its value.
        dtype: its dtype.

    >>> scalar({"w": torch.ones(1)}, 0, torch.int64)
    tensor(0)
    """
    return torch.full((), number, dtype=dtype, device=device_of(params))


def as_value(caller: str, value: Any, like: Tensor, name: str = "value") -> Tensor:
    """Turn the value that came with an update into a float64 0-d tensor.

    Args:
        caller: opens the message.
        value: a number or a 0-d tensor.
        like: tells the device.
        name: of the argument.

    Raises:
        ValueError: a tensor with axes.

    >>> as_value("accumulate", 0.5, torch.zeros(()))
    tensor(0.5000, dtype=torch.float64)
    """
    found = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if found.ndim:
        raise ValueError(f"{caller}: {name} must be a scalar, got {list(found.shape)}")
    return found


def all_finite(grads: Tree, device: torch.device) -> Tensor:
    """Say whether all gradients are finite (bool []); `None` is.

    >>> all_finite({"w": torch.tensor([1.0, torch.inf]), "frozen": None}, torch.device("cpu"))
    tensor(False)
    """
    flags = [torch.isfinite(g).all() for g in tree.leaves(grads) if g is not None]
    return reduce(torch.logical_and, flags, torch.ones((), dtype=torch.bool, device=device))


def stays_finite(params: Tree, updates: Tree, device: torch.device) -> Tensor:
    """Say whether updates leave finite parameters finite (bool []), in the dtypes of these.

    >>> params = {"w": torch.tensor([6e4, torch.inf]).half()}
    >>> stays_finite(params, {"w": torch.tensor([1e4, 1.0])}, torch.device("cpu"))
    tensor(False)
    """
    new = apply_updates(params, updates)
    spoilt = tree.map(lambda p, n: torch.isfinite(p) & ~torch.isfinite(n), params, new)
    flags = [~leaf.any() for leaf in tree.leaves(spoilt)]
    return reduce(torch.logical_and, flags, torch.ones((), dtype=torch.bool, device=device))


NOTHING = torch.zeros((), dtype=torch.float64)  # in the place of a field that a file lacks


def times(count: Any, x: Tensor) -> Tensor:
    """Weigh a gradient or a value by how many examples it is the mean of; 1 if that is not said.

    What is the mean of no examples is 0, whatever it holds.

    >>> times(2, torch.ones(1)), times(0, torch.tensor([torch.nan]))
    (tensor([2.]), tensor([0.]))
    """
    if count is None:
        return x
    count = torch.as_tensor(count, dtype=x.dtype, device=x.device)
    return torch.where(count > 0, count * x, 0.0)


def surplus_of(caller: str, count: Any, like: Tensor) -> Tensor | float:
    """Say by how much more than 1 an update counts (float64 []).

    Args:
        caller: opens the message.
        count: a number or a 0-d tensor, None for 1.
        like: tells the device.

    Raises:
        ValueError: a tensor with axes.

    >>> surplus_of("accumulate", 4, torch.zeros(()))
    tensor(3., dtype=torch.float64)
    """
    return 0.0 if count is None else as_value(caller, count, like, "count") - 1


# ------------------------------------------------------------------------------ optimizers


def _decay(caller: str, weight_decay: ScalarOrSchedule, mask: Where | None) -> list[Optimizer]:
    check_rate(caller, "weight_decay", weight_decay)
    return [] if is_zero(weight_decay) else [add_decayed_weights(weight_decay, mask)]


def _sign(maximize: bool) -> list[Optimizer]:
    return [scale(-1.0)] if maximize else []
