"""Helpers of the schedules: checks of arguments, progress, annealing, powers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdl.optim._hyperparams import known_values

Value = float | Tensor  # finite and at least 0; a tensor is 0-d


def check_values(caller: str, **values: Value) -> None:
    """Raise unless each is a finite number of at least 0, or a 0-d tensor of such a number.

    >>> check_values("step", value=0.1)
    """
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(
                f"schedules.{caller}: {name} must be a number or a 0-d tensor, got "
                f"{list(value.shape)}"
            )
        for number in known_values(value) if isinstance(value, Tensor) else [value]:
            check_numbers(caller, **{name: number})


def check_numbers(caller: str, low: float = 0.0, high: float = math.inf, **numbers: float) -> None:
    """Raise unless each is a finite number of at least `low` and at most `high`.

    >>> check_numbers("step", gamma=0.1)
    """
    rule = f"finite and at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
    for name, x in numbers.items():
        number = isinstance(x, (int, float)) and not isinstance(x, bool)
        if not (number and math.isfinite(x) and low <= x <= high):
            raise ValueError(f"schedules.{caller}: {name} must be {rule}, got {x!r}")


def check_positive(caller: str, **numbers: float) -> None:
    """Raise unless each is a finite number above 0.

    >>> check_positive("one_cycle", div_factor=25.0)
    """
    for name, x in numbers.items():
        check_numbers(caller, **{name: x})
        if x == 0:
            raise ValueError(f"schedules.{caller}: {name} must be above 0, got {x!r}")


def check_ints(caller: str, low: int, **ints: int) -> None:
    """Raise unless each is an int of at least `low`.

    >>> check_ints("step", low=1, step_size=30)
    """
    for name, x in ints.items():
        if not isinstance(x, int) or isinstance(x, bool):
            raise ValueError(f"schedules.{caller}: {name} must be an int, got {x!r}")
        if x < low:
            raise ValueError(f"schedules.{caller}: {name} must be at least {low}, got {x}")


def check_milestones(caller: str, milestones: Sequence[int]) -> None:
    """Raise unless milestones are ints of at least 0 in ascending order, possibly repeated.

    >>> check_milestones("join", [10, 20, 20])
    """
    for milestone in milestones:
        check_ints(caller, low=0, milestones=milestone)
    if list(milestones) != sorted(milestones):
        raise ValueError(
            f"schedules.{caller}: milestones must be in ascending order, got {list(milestones)}"
        )


def check_choice(caller: str, name: str, choice: str, choices: Sequence[str]) -> None:
    """Raise unless `choice` is one of `choices`.

    >>> check_choice("one_cycle", "anneal_strategy", "cos", ["cos", "linear"])
    """
    if choice not in choices:
        raise ValueError(f"schedules.{caller}: {name} must be one of {choices}, got {choice!r}")


def check_callable(caller: str, **functions: Any) -> None:
    """Raise unless each can be called.

    >>> check_callable("lambda_lr", factor=abs)
    """
    for name, f in functions.items():
        if not callable(f):
            raise ValueError(f"schedules.{caller}: {name} must be callable, got {f!r}")


def call(f: Callable[[Tensor], Any], count: Tensor) -> Tensor:
    """Evaluate a user's function, and convert the result to float64.

    >>> call(lambda t: 2, torch.tensor(5))
    tensor(2., dtype=torch.float64)
    """
    return torch.as_tensor(f(count), dtype=torch.float64, device=count.device)


def geometric(gamma: float, times: Tensor) -> Tensor:
    """Compute gamma ** times in float64.

    >>> geometric(0.5, torch.tensor([0, 1, 2]))
    tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    return torch.pow(gamma, times.double())


def progress(count: Tensor, length: float, start: float = 0) -> Tensor:
    """Return the fraction of a phase that is over: 0 up to `start`, 1 from `start + length` on.

    >>> progress(torch.tensor([0, 5, 10, 15]), 10)
    tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    if length == 0:
        return (count >= start).double()
    return ((count.double() - start) / length).clamp(0, 1)


def cosine(first: Value, last: Value, x: Tensor) -> Tensor:
    """Anneal from `first` at x = 0 to `last` at x = 1 along half a cosine.

    >>> cosine(3.0, 1.0, torch.tensor([0.0, 0.5, 1.0]))
    tensor([3., 2., 1.])
    """
    return line(first, last, (1 - torch.cos(math.pi * x)) / 2)


def line(first: Value, last: Value, x: Tensor) -> Tensor:
    """Anneal from `first` at x = 0 to `last` at x = 1 along a line.

    >>> line(3.0, 1.0, torch.tensor([0.0, 0.5, 1.0]))
    tensor([3., 2., 1.])
    """
    return first * (1 - x) + last * x  # exact at both ends


ANNEAL = {"cos": cosine, "linear": line}
