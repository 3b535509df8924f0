"""Schedules: pure functions from the count of updates (int64 tensor) to a value (float64 tensor).

Pass one wherever an optimizer takes a rate: `sgd(lr=schedules.step(0.1, step_size=30))`; `by_epoch`
makes it count epochs. Every
class of `torch.optim.lr_scheduler` that depends only on the count has a function here, with torch's
names for the arguments. Torch updates the previous rate; here a value is a closed form of the
count, on its device, so it can be compiled once, vmapped, or plotted at a vector of counts.
"""

from __future__ import annotations

from fdl.optim.schedules._basic import (
    by_epoch,
    chained,
    constant,
    exponential,
    join,
    lambda_lr,
    linear,
    multi_step,
    multiplicative,
    polynomial,
    step,
)
from fdl.optim.schedules._periodic import (
    cosine_annealing,
    cosine_annealing_warm_restarts,
    cyclic,
    cyclic_momentum,
)
from fdl.optim.schedules._phases import (
    one_cycle,
    one_cycle_momentum,
    swa_anneal,
    warmup_cosine,
    warmup_stable_decay,
)

__all__ = [
    "by_epoch",
    "chained",
    "constant",
    "cosine_annealing",
    "cosine_annealing_warm_restarts",
    "cyclic",
    "cyclic_momentum",
    "exponential",
    "join",
    "lambda_lr",
    "linear",
    "multi_step",
    "multiplicative",
    "one_cycle",
    "one_cycle_momentum",
    "polynomial",
    "step",
    "swa_anneal",
    "warmup_cosine",
    "warmup_stable_decay",
]
