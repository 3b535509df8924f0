"""Choose how a run is executed: compiled or eager, and in chunks of how many steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from fdl import TrainState, data, train_step
from fdl._compiler._deferred import deferred_imports
from train.config import Recipe
from train.recipes import Problem

__all__ = [
    "Cost",
    "Plan",
    "choose_plan",
    "cost_of",
    "describe",
    "make_plan",
    "steps_per_epoch",
    "timed",
]

CHUNK_SECONDS = 0.5  # the longest that an interruption should have to wait
COMPILE_SECONDS = 8.0  # compiling takes 5 to 10 s the first time; shorter runs stay eager


# An eager step as two cores of a CPU, or a GPU, usually take it: calls, and operations a second.
CALLS = 1e-3
SPEED = {"cpu": 2e10, "cuda": 1e13}


class Cost(NamedTuple):
    """What an eager step takes here and now, and what it usually takes, in seconds."""

    seconds: float
    usual: float


class Plan(NamedTuple):
    """The way a run is executed; results depend on it only by rounding."""

    compile: bool
    chunk: int  # steps
    reason: str


def make_plan(problem: Problem, config: Recipe, state: TrainState) -> Plan:
    """Try an eager step and choose a plan from that."""
    order = data.sequential_indices(
        len(problem.train.x), config.batch_size, device=state.key.device
    )
    batch = data.to_float(data.batch(problem.train, (order.index[0], order.mask[0])))
    step = train_step(problem.loss, problem.opt)
    with deferred_imports():  # the step may be the only one that is not compiled
        cost = cost_of(lambda: step(state, batch), state.key.device)
    plan = choose_plan(config, cost, steps_per_epoch(problem, config))
    if not plan.compile:  # torch imports its compiler for the first gradient: not in a timed epoch
        step(state, batch)
    return plan


def cost_of(step: Callable[[], Any], device: torch.device) -> Cost:
    """Count the products of an eager step, the first, and time it."""
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = min(timed(step, device) for _ in range(2))
    speed = SPEED.get(device.type, SPEED["cuda"])
    return Cost(seconds, CALLS + counter.get_total_flops() / speed)


def choose_plan(config: Recipe, cost: Cost, steps: int) -> Plan:
    """Choose the plan of a run.

    What it computes depends on the plan by rounding only, but a run that is repeated has the same
    bits: whether to compile follows from the work, not from how busy the machine is.

    Args:
        config: the options of the run.
        cost: the time of an eager step.
        steps: number of steps in an epoch.

    >>> choose_plan(Recipe(epochs=3), Cost(0.01, 0.01), 100)
    Plan(compile=False, chunk=50, reason='about 3 s in all, too short to pay for compiling')
    """
    # A power of two, because a number that followed each measurement would rarely give a program
    # that the compiler has in its cache.
    chunks = 2 ** math.ceil(math.log2(max(1.0, steps * cost.seconds / CHUNK_SECONDS)))
    chunk = math.ceil(steps / min(chunks, steps))
    total = cost.usual * steps * config.epochs
    if config.compile != "auto":
        return Plan(config.compile == "on", chunk, f"--compile {config.compile}")
    if total < COMPILE_SECONDS:
        about = f"about {total:.0f} s" if total > 1 else "less than 1 s"
        return Plan(False, chunk, f"{about} in all, too short to pay for compiling")
    return Plan(True, chunk, f"eager steps would take about {total:.0f} s")


def describe(plan: Plan) -> str:
    """Announce how a run is executed.

    >>> print(describe(choose_plan(Recipe(), Cost(0.05, 0.05), 240)))
    compiled: eager steps would take about 120 s
    >>> print(describe(choose_plan(Recipe(compile="off"), Cost(0.05, 0.05), 240)))
    not compiled: --compile off
    """
    return f"{'compiled' if plan.compile else 'not compiled'}: {plan.reason}"


def steps_per_epoch(problem: Problem, config: Recipe) -> int:
    """Return the number of steps in an epoch."""
    return problem.passes * math.ceil(problem.train.x.shape[0] / config.batch_size)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes, its work on `device` included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
