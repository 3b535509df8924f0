"""Periodic schedules: cosines and triangles."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fdl.optim._hyperparams import Schedule
from fdl.optim.schedules._helpers import (
    Value,
    call,
    check_callable,
    check_choice,
    check_ints,
    check_numbers,
    check_values,
    cosine,
    geometric,
)

# By mode: the scale as a function (gamma, x), and what x counts.
MODES: dict[str, tuple[Callable[[float, Tensor], Any], str]] = {
    "triangular": (lambda gamma, x: 1.0, "cycle"),
    "triangular2": (lambda gamma, x: geometric(0.5, x - 1), "cycle"),
    "exp_range": (lambda gamma, x: geometric(gamma, x), "iterations"),
}


def cosine_annealing(value: Value, T_max: int, eta_min: Value = 0.0) -> Schedule:
    """Follow a cosine between `value` and `eta_min`: `CosineAnnealingLR`.

    eta_min + ½(value − eta_min)(1 + cos(πt / T_max)): `eta_min` at `T_max`, `value` again at
    2·T_max, and so on, as in torch.

    Args:
        value: initial value.
        T_max: half a period, in updates.
        eta_min: the smallest value.

    Raises:
        ValueError: a value is negative or not finite; `T_max` is not an int of at least 1.

    >>> cosine_annealing(1.0, 2)(torch.arange(5))
    tensor([1.0000, 0.5000, 0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_values("cosine_annealing", value=value, eta_min=eta_min)
    check_ints("cosine_annealing", low=1, T_max=T_max)
    return lambda count: cosine(value, eta_min, (count % (2 * T_max)).double() / T_max)


def cosine_annealing_warm_restarts(
    value: Value, T_0: int, T_mult: int = 1, eta_min: Value = 0.0
) -> Schedule:
    """Follow half a cosine again and again: `CosineAnnealingWarmRestarts`.

    eta_min + ½(value − eta_min)(1 + cos(πt / T)), where t counts from the last restart and T is
    T_0 · T_multⁿ after n restarts. Source: Loshchilov & Hutter, SGDR: Stochastic Gradient Descent
    with Warm Restarts, 2017, https://arxiv.org/abs/1608.03983

    Args:
        value: value at each restart.
        T_0: number of updates before the first restart.
        T_mult: factor of the length of each cycle relative to the one before.
        eta_min: value at the end of each cycle.

    Raises:
        ValueError: a value is negative or not finite; `T_0` or `T_mult` is not an int of at least
            1.

    >>> cosine_annealing_warm_restarts(1.0, T_0=1, T_mult=2)(torch.arange(4))
    tensor([1.0000, 1.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_values("cosine_annealing_warm_restarts", value=value, eta_min=eta_min)
    check_ints("cosine_annealing_warm_restarts", low=1, T_0=T_0, T_mult=T_mult)
    if T_mult == 1:
        return lambda count: cosine(value, eta_min, (count % T_0).double() / T_0)

    def schedule(count: Tensor) -> Tensor:
        # Restart n is at T_0 (T_multⁿ − 1) / (T_mult − 1). Half an update is added to the count so
        # that the logarithm is never an integer, where rounding would decide.
        t = count.double()
        n = torch.log1p((t + 0.5) * (T_mult - 1) / T_0) / math.log(T_mult)
        length = T_0 * geometric(T_mult, n.floor())
        return cosine(value, eta_min, (t - (length - T_0) / (T_mult - 1)) / length)

    return schedule


def cyclic(
    base_lr: Value,
    max_lr: Value,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    scale_fn: Callable[[Tensor], Any] | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """Rise and fall in triangles: `CyclicLR`; for the momentum see `cyclic_momentum`.

    base_lr + (max_lr − base_lr) · height · scale, where the height goes linearly from 0 to 1 in
    `step_size_up` updates and back to 0 in `step_size_down`. Source: Smith, Cyclical Learning Rates
    for Training Neural Networks, 2017, https://arxiv.org/abs/1506.01186

    Args:
        base_lr: value at the start of each cycle.
        max_lr: value at the first peak.
        step_size_up: number of updates from the start to the peak.
        step_size_down: number of updates back; `step_size_up` if None, 0 to fall at once.
        mode: the scale: "triangular" is 1, "triangular2" halves with each cycle, "exp_range" is
            gamma^t. Ignored if there is a `scale_fn`.
        gamma: base of "exp_range".
        scale_fn: the scale, a function of a float64 tensor, see `scale_mode`.
        scale_mode: argument of `scale_fn`: "cycle", the number of the cycle from 1, or
            "iterations", the count of updates.

    Raises:
        ValueError: a value is negative or not finite, a size is not an int or too small, a mode is
            unknown.

    >>> cyclic(1.0, 3.0, step_size_up=2)(torch.arange(6))
    tensor([1., 2., 3., 2., 1., 2.], dtype=torch.float64)
    """
    check_values("cyclic", base_lr=base_lr, max_lr=max_lr)
    return _triangles(
        "cyclic", base_lr, max_lr, step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode
    )


def cyclic_momentum(
    base_momentum: Value = 0.8,
    max_momentum: Value = 0.9,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
    scale_fn: Callable[[Tensor], Any] | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """Cycle a momentum inversely to `cyclic`: `CyclicLR` with `cycle_momentum`.

    max_momentum − (max_momentum − base_momentum) · height · scale: lowest where the rate peaks.
    Pass it with the rate: `sgd(lr=cyclic(0.1, 1.0), momentum=cyclic_momentum())`.

    Args:
        base_momentum: value at the first trough.
        max_momentum: value at the start of each cycle.
        step_size_up: number of updates from the start to the trough.
        step_size_down: number of updates back to `max_momentum`, as in `cyclic`.
        mode: "triangular", "triangular2" or "exp_range", as in `cyclic`.
        gamma: base of "exp_range".
        scale_fn: the scale, a function of your own.
        scale_mode: argument of `scale_fn`, "cycle" or "iterations".

    Raises:
        ValueError: as in `cyclic`.

    >>> cyclic_momentum(0.5, 1.0, step_size_up=2)(torch.arange(5))
    tensor([1.0000, 0.7500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_values("cyclic_momentum", base_momentum=base_momentum, max_momentum=max_momentum)
    return _triangles(
        "cyclic_momentum",
        max_momentum,
        base_momentum,
        step_size_up,
        step_size_down,
        mode,
        gamma,
        scale_fn,
        scale_mode,
    )


def _triangles(
    caller: str,
    foot: Value,
    peak: Value,
    up: int,
    down: int | None,
    mode: str,
    gamma: float,
    scale_fn: Callable[[Tensor], Any] | None,
    scale_mode: str,
) -> Schedule:
    check_ints(caller, low=1, step_size_up=up)
    down = up if down is None else down
    check_ints(caller, low=0, step_size_down=down)
    check_numbers(caller, gamma=gamma)
    check_choice(caller, "scale_mode", scale_mode, ["cycle", "iterations"])
    if scale_fn is None:
        check_choice(caller, "mode", mode, list(MODES))
        by_mode, scale_mode = MODES[mode]
        scale_fn = partial(by_mode, gamma)
    check_callable(caller, scale_fn=scale_fn)
    length = up + down

    def schedule(count: Tensor) -> Tensor:
        t = (count % length).double()
        height = torch.where(t <= up, t / up, (length - t) / max(down, 1))
        x = count // length + 1 if scale_mode == "cycle" else count
        return foot + (peak - foot) * height * call(scale_fn, x.double())

    return schedule
