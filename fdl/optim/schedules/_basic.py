"""Schedules of one formula, and functions that join and multiply schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdl._checks import as_tuple
from fdl.optim._hyperparams import Schedule
from fdl.optim.schedules._helpers import (
    Value,
    call,
    check_callable,
    check_ints,
    check_milestones,
    check_numbers,
    check_values,
    geometric,
    line,
    progress,
)


def constant(value: Value, factor: float = 1.0, total_iters: int = 0) -> Schedule:
    """Hold `value`, after `factor * value` for the first `total_iters` updates: `ConstantLR`.

    Unlike a plain number it cannot be replaced with `with_hyperparams`. Torch's defaults are 1/3
    and 5; with `total_iters=0`, torch keeps the factor forever.

    Args:
        value: the value.
        factor: initial factor; may be above 1.
        total_iters: number of updates with the factor.

    Raises:
        ValueError: `value` or `factor` is negative or not finite; `total_iters` is not an int of at
            least 0.

    >>> constant(0.1)(torch.tensor(7))
    tensor(0.1000, dtype=torch.float64)
    >>> constant(1.0, 0.5, 2)(torch.arange(4))
    tensor([0.5000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    check_values("constant", value=value)
    check_numbers("constant", factor=factor)
    check_ints("constant", low=0, total_iters=total_iters)
    return lambda count: value * geometric(factor, count < total_iters)


def lambda_lr(value: Value, factor: Callable[[Tensor], Any]) -> Schedule:
    """Multiply by a function of the count: `LambdaLR`.

    The function is passed the count as float64, so that `0.95**count` is float64 as well (for an
    int64 tensor it would be float32); to index with it, write `table[count.long()]`.

    Raises:
        ValueError: `value` is negative or not finite; `factor` is not callable.

    >>> lambda_lr(1.0, lambda count: 1 / (1 + count))(torch.tensor(3))
    tensor(0.2500, dtype=torch.float64)
    """
    check_values("lambda_lr", value=value)
    check_callable("lambda_lr", factor=factor)
    return lambda count: value * call(factor, count.double())


def multiplicative(value: Value, factor: Callable[[Tensor], Any], total_iters: int) -> Schedule:
    """Multiply by a function of the count, again at each update: `MultiplicativeLR`.

    value · factor(1) · … · factor(t). There is no closed form: at each count all `total_iters`
    factors are computed at once and those up to t multiplied, hence the bound; after it the last
    value is held. If you know the product, `lambda_lr` is cheaper.

    Args:
        value: initial value.
        factor: an elementwise function of the counts 1 … total_iters, a float64 vector.
        total_iters: the last update that multiplies.

    Raises:
        ValueError: `value` is negative or not finite; `factor` is not callable; `total_iters` is
            not an int of at least 1.

    >>> multiplicative(1.0, lambda count: count, total_iters=4)(torch.arange(6))
    tensor([ 1.,  1.,  2.,  6., 24., 24.], dtype=torch.float64)
    """
    check_values("multiplicative", value=value)
    check_callable("multiplicative", factor=factor)
    check_ints("multiplicative", low=1, total_iters=total_iters)

    def schedule(count: Tensor) -> Tensor:
        k = torch.arange(1, total_iters + 1, device=count.device)
        factors = call(factor, k.double())
        return value * torch.where(k <= count.unsqueeze(-1), factors, 1.0).prod(-1)

    return schedule


def step(value: Value, step_size: int, gamma: float = 0.1) -> Schedule:
    """Multiply by `gamma` after each `step_size` updates: `StepLR`.

    value · gamma^⌊t / step_size⌋.

    Args:
        value: initial value.
        step_size: number of updates with each value.
        gamma: the factor.

    Raises:
        ValueError: `value` or `gamma` is negative or not finite; `step_size` is not an int of at
            least 1.

    >>> step(1.0, step_size=2, gamma=0.5)(torch.arange(5))
    tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.2500], dtype=torch.float64)
    """
    check_values("step", value=value)
    check_ints("step", low=1, step_size=step_size)
    check_numbers("step", gamma=gamma)
    return lambda count: value * geometric(gamma, count // step_size)


def multi_step(value: Value, milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """Multiply by `gamma` at each milestone: `MultiStepLR`.

    value · gamma^(number of milestones ≤ t); one that is listed twice counts twice.

    Args:
        value: initial value.
        milestones: counts of updates, in ascending order.
        gamma: the factor.

    Raises:
        ValueError: `value` or `gamma` is negative or not finite; `milestones` are not ascending
            ints of at least 0.

    >>> multi_step(1.0, [2, 3, 3], gamma=0.5)(torch.arange(5))
    tensor([1.0000, 1.0000, 0.5000, 0.1250, 0.1250], dtype=torch.float64)
    """
    milestones = as_tuple("schedules.multi_step", "milestones", milestones, "a list of ints")
    check_values("multi_step", value=value)
    check_milestones("multi_step", milestones)
    check_numbers("multi_step", gamma=gamma)

    def schedule(count: Tensor) -> Tensor:
        passed = sum((count >= milestone for milestone in milestones), torch.zeros_like(count))
        return value * geometric(gamma, passed)

    return schedule


def linear(
    value: Value, start_factor: float = 1 / 3, end_factor: float = 1.0, total_iters: int = 5
) -> Schedule:
    """Change the value along a line, then hold it: `LinearLR`.

    value · (start_factor + (end_factor − start_factor) · min(t / total_iters, 1)). Unlike torch's,
    the factors may be 0 and above 1.

    Args:
        value: value that the factors multiply.
        start_factor: initial factor.
        end_factor: final factor.
        total_iters: number of updates from the first to the last factor.

    Raises:
        ValueError: a number is negative or not finite; `total_iters` is not an int of at least 1.

    >>> linear(1.0, start_factor=0.5, total_iters=2)(torch.arange(4))
    tensor([0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    check_values("linear", value=value)
    check_numbers("linear", start_factor=start_factor, end_factor=end_factor)
    check_ints("linear", low=1, total_iters=total_iters)
    return lambda count: value * line(start_factor, end_factor, progress(count, total_iters))


def exponential(value: Value, gamma: float) -> Schedule:
    """Multiply by `gamma` at each update: value · gammaᵗ, `ExponentialLR`.

    Raises:
        ValueError: `value` or `gamma` is negative or not finite.

    >>> exponential(1.0, gamma=0.5)(torch.arange(4))
    tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    """
    check_values("exponential", value=value)
    check_numbers("exponential", gamma=gamma)
    return lambda count: value * geometric(gamma, count)


def polynomial(value: Value, total_iters: int = 5, power: float = 1.0) -> Schedule:
    """Fall to 0 along a polynomial: value · (1 − min(t / total_iters, 1))^power, `PolynomialLR`.

    Args:
        value: initial value.
        total_iters: number of updates until the value is 0.
        power: the exponent.

    Raises:
        ValueError: `value` or `power` is negative or not finite; `total_iters` is not an int of at
            least 1.

    >>> polynomial(1.0, total_iters=2, power=2.0)(torch.arange(4))
    tensor([1.0000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_values("polynomial", value=value)
    check_numbers("polynomial", power=power)
    check_ints("polynomial", low=1, total_iters=total_iters)
    return lambda count: value * (1 - progress(count, total_iters)) ** power


def join(schedules: Sequence[Schedule], milestones: Sequence[int]) -> Schedule:
    """Follow schedules one after another, each counting from its own start: `SequentialLR`.

    Schedule i + 1 begins at milestone i, with its own initial value; torch's `MultiplicativeLR`
    would continue from the last rate instead.

    Args:
        schedules: one schedule or more.
        milestones: counts of updates in ascending order, one fewer than schedules.

    Raises:
        ValueError: a schedule is not callable; `milestones` are not one fewer than `schedules`, or
            not ascending ints of at least 0.

    >>> join([linear(1.0, 0.0, 1.0, 2), step(1.0, 1, gamma=0.5)], [2])(torch.arange(5))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    schedules = as_tuple("schedules.join", "schedules", schedules, "a list of schedules")
    milestones = as_tuple("schedules.join", "milestones", milestones, "a list of ints")
    for schedule in schedules:
        check_callable("join", schedules=schedule)
    check_milestones("join", milestones)
    if len(milestones) != len(schedules) - 1:
        raise ValueError(
            f"schedules.join: milestones must be one fewer than schedules, got {len(milestones)} "
            f"for {len(schedules)}"
        )

    def joined(count: Tensor) -> Tensor:
        value = call(schedules[0], count)
        for milestone, schedule in zip(milestones, schedules[1:], strict=True):
            own = call(schedule, (count - milestone).clamp(min=0))
            value = torch.where(count >= milestone, own, value)
        return value

    return joined


def chained(value: Value, *factors: Schedule) -> Schedule:
    """Multiply a value by schedules: `ChainedScheduler` of schedules that multiply the rate.

    value · Π factor(t), each factor a schedule made with the value 1: `constant`, `multiplicative`,
    `step`, `multi_step`, `linear`, `exponential`, `polynomial`. Torch's other schedulers are not
    factors: they set the rate or, like `CosineAnnealingLR`, add to it (with `eta_min` 0 and up to
    `T_max` that equals the product), so that chained, their values depend on the whole past.

    Args:
        value: value that the factors multiply.
        *factors: one schedule or more.

    Raises:
        ValueError: `value` is negative or not finite; there is no factor, or one is not callable.

    >>> warm = linear(1.0, 0.5, total_iters=2)
    >>> chained(0.1, warm, step(1.0, step_size=3))(torch.arange(4))
    tensor([0.0500, 0.0750, 0.1000, 0.0100], dtype=torch.float64)
    """
    check_values("chained", value=value)
    for factor in factors:
        check_callable("chained", factors=factor)
    if not factors:
        raise ValueError("schedules.chained: factors must be at least one schedule, got none")

    def schedule(count: Tensor) -> Tensor:
        product = value * call(factors[0], count)
        for factor in factors[1:]:
            product = product * call(factor, count)
        return product

    return schedule


def by_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """Count epochs instead of updates: any scheduler of torch that is stepped once per epoch.

    The value of epoch e, `schedule(e)`, holds for all its updates, and e = ⌊t / steps_per_epoch⌋
    counts from 0.

    Args:
        schedule: a schedule of the number of epochs done.
        steps_per_epoch: number of updates in an epoch: rows of `data.epoch_indices`, divided by k
            inside `accumulate(opt, k)`.

    Raises:
        ValueError: `schedule` is not callable; `steps_per_epoch` is not an int of at least 1.

    >>> halved = step(0.8, step_size=1, gamma=0.5)
    >>> by_epoch(halved, steps_per_epoch=2)(torch.arange(6))
    tensor([0.8000, 0.8000, 0.4000, 0.4000, 0.2000, 0.2000], dtype=torch.float64)
    """
    check_callable("by_epoch", schedule=schedule)
    check_ints("by_epoch", low=1, steps_per_epoch=steps_per_epoch)
    return lambda count: call(schedule, count // steps_per_epoch)
