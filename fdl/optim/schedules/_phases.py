"""Schedules that go through phases and then hold their last value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdl.optim._hyperparams import Schedule
from fdl.optim.schedules._helpers import (
    ANNEAL,
    Value,
    call,
    check_choice,
    check_ints,
    check_numbers,
    check_positive,
    check_values,
    cosine,
    line,
    progress,
)


def one_cycle(
    max_lr: Value,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Rise to `max_lr` and fall below the initial value, once: `OneCycleLR`.

    From max_lr / div_factor to max_lr at update pct_start · total_steps − 1, then to
    max_lr / (div_factor · final_div_factor) at update total_steps − 1. The last value is held,
    while torch raises an error there, which a compiled program cannot. Source: Smith & Topin,
    Super-Convergence, 2017, https://arxiv.org/abs/1708.07120

    Args:
        max_lr: the peak.
        total_steps: number of updates.
        pct_start: fraction of the updates in which the value rises, in [0, 1].
        anneal_strategy: "cos" or "linear".
        div_factor: ratio of the peak to the initial value.
        final_div_factor: ratio of the initial to the last value.
        three_phase: fall to the initial value in as many updates as it rose in, then to the last.

    Raises:
        ValueError: a number out of range, `total_steps` is not an int of at least 1, an unknown
            strategy.

    >>> schedule = one_cycle(1.0, 5, pct_start=0.6, div_factor=2.0, final_div_factor=2.0)
    >>> schedule(torch.arange(6))
    tensor([0.5000, 0.7500, 1.0000, 0.6250, 0.2500, 0.2500], dtype=torch.float64)
    """
    check_values("one_cycle", max_lr=max_lr)
    check_positive("one_cycle", div_factor=div_factor, final_div_factor=final_div_factor)
    first = max_lr / div_factor
    turns = [first, max_lr, *([first] if three_phase else []), first / final_div_factor]
    return _phases("one_cycle", turns, total_steps, pct_start, anneal_strategy)


def one_cycle_momentum(
    total_steps: int,
    base_momentum: Value = 0.85,
    max_momentum: Value = 0.95,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    three_phase: bool = False,
) -> Schedule:
    """Move a momentum inversely to `one_cycle`: `OneCycleLR` with `cycle_momentum`.

    From max_momentum to base_momentum, where the rate peaks, and back. Pass it with the rate:
    `sgd(lr=one_cycle(0.1, n), momentum=one_cycle_momentum(n))`.

    Args:
        total_steps: number of updates; the last value is held.
        base_momentum: value where the rate peaks.
        max_momentum: value at both ends.
        pct_start: fraction of the updates in which the value falls, in [0, 1].
        anneal_strategy: "cos" or "linear".
        three_phase: return as soon as the rate does, then hold the value.

    Raises:
        ValueError: as in `one_cycle`.

    >>> one_cycle_momentum(5, 0.5, 1.0, pct_start=0.6)(torch.arange(5))
    tensor([1.0000, 0.7500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_values("one_cycle_momentum", base_momentum=base_momentum, max_momentum=max_momentum)
    turns = [max_momentum, base_momentum, max_momentum]
    turns += [max_momentum] if three_phase else []
    return _phases("one_cycle_momentum", turns, total_steps, pct_start, anneal_strategy)


def _phases(
    caller: str, turns: Sequence[Value], total_steps: int, pct_start: float, strategy: str
) -> Schedule:
    """Anneal from each value to the next one; the peak is the second."""
    check_ints(caller, low=1, total_steps=total_steps)
    check_numbers(caller, high=1.0, pct_start=pct_start)
    check_choice(caller, "anneal_strategy", strategy, list(ANNEAL))
    last = total_steps - 1
    peak = pct_start * total_steps - 1  # at least −1, not always an integer
    ends = [peak, last] if len(turns) == 3 else [peak, 2 * peak, last]

    def schedule(count: Tensor) -> Tensor:
        t = count.clamp(max=last).double()
        result = turns[0] + torch.zeros_like(t)
        start = 0.0
        for end, first, then in zip(ends, turns, turns[1:], strict=False):
            if end > start:  # otherwise no count is in this phase
                x = progress(t, end - start, start)
                result = torch.where(t > start, ANNEAL[strategy](first, then, x), result)
            start = end
        return result

    return schedule


def swa_anneal(
    value: Value | Schedule,
    swa_lr: Value,
    swa_start: int,
    anneal_epochs: int = 10,
    anneal_strategy: str = "cos",
) -> Schedule:
    """Anneal to the rate of stochastic weight averaging: `torch.optim.swa_utils.SWALR`.

    The value at update `swa_start` is annealed to `swa_lr`, which is reached `anneal_epochs`
    updates later and held. Source: Izmailov et al., Averaging Weights Leads to Wider Optima and
    Better Generalization, 2018, https://arxiv.org/abs/1803.05407

    Args:
        value: the value up to `swa_start`, or a schedule of it.
        swa_lr: the last value.
        swa_start: count at which annealing starts, from which on torch's scheduler is stepped.
        anneal_epochs: number of updates (not epochs) of annealing; 0 to jump.
        anneal_strategy: "cos" or "linear".

    Raises:
        ValueError: a value is negative or not finite; a number of updates is not an int of at least
            0; an unknown strategy.

    >>> swa_anneal(1.0, 0.5, swa_start=1, anneal_epochs=2)(torch.arange(5))
    tensor([1.0000, 1.0000, 0.7500, 0.5000, 0.5000], dtype=torch.float64)
    """
    check_values("swa_anneal", swa_lr=swa_lr)
    if not callable(value):
        check_values("swa_anneal", value=value)
    check_ints("swa_anneal", low=0, swa_start=swa_start, anneal_epochs=anneal_epochs)
    check_choice("swa_anneal", "anneal_strategy", anneal_strategy, list(ANNEAL))

    def schedule(count: Tensor) -> Tensor:
        first = call(value, count.clamp(max=swa_start)) if callable(value) else value
        return ANNEAL[anneal_strategy](first, swa_lr, progress(count, anneal_epochs, swa_start))

    return schedule


def warmup_cosine(value: Value, warmup: int, total: int, end: Value = 0.0) -> Schedule:
    """Rise from 0 to `value` along a line, then fall to `end` along half a cosine, and stay.

    Args:
        value: the peak, at update `warmup`.
        warmup: number of updates of the rise; with 0 the initial value is the peak.
        total: update at which `end` is reached.
        end: the last value.

    Raises:
        ValueError: a value is negative or not finite; `warmup` is not an int of at least 0, or
            `total` not a greater int.

    >>> warmup_cosine(1.0, warmup=2, total=4)(torch.arange(6))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_values("warmup_cosine", value=value, end=end)
    check_ints("warmup_cosine", low=0, warmup=warmup)
    check_ints("warmup_cosine", low=warmup + 1, total=total)

    def schedule(count: Tensor) -> Tensor:
        fall = cosine(value, end, progress(count, total - warmup, warmup))
        return torch.where(count < warmup, value * progress(count, warmup), fall)

    return schedule


def warmup_stable_decay(
    value: Value, warmup: int, stable: int, decay: int, end: Value = 0.0
) -> Schedule:
    """Rise from 0 to `value`, hold it, fall to `end`, and stay: the schedule called WSD.

    Both ramps are lines. Source: Hu et al., MiniCPM, 2024, https://arxiv.org/abs/2404.06395

    Args:
        value: the value held.
        warmup: number of updates of the rise; with 0 the initial value is the one held.
        stable: number of updates for which the value is held.
        decay: number of updates of the fall; 0 to jump.
        end: the last value.

    Raises:
        ValueError: a value is negative or not finite; a number of updates is not an int of at least
            0.

    >>> warmup_stable_decay(1.0, warmup=2, stable=1, decay=2)(torch.arange(6))
    tensor([0.0000, 0.5000, 1.0000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    check_values("warmup_stable_decay", value=value, end=end)
    check_ints("warmup_stable_decay", low=0, warmup=warmup, stable=stable, decay=decay)
    start = warmup + stable

    def schedule(count: Tensor) -> Tensor:
        fall = line(value, end, progress(count, decay, start))
        return torch.where(count < start, value * progress(count, warmup), fall)

    return schedule
