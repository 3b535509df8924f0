"""The loop around the pure step: chunks, evaluation, interruption.

An epoch is a `scan` over rows of indices, cut into chunks of one fixed length so that one program
serves them all. Only between chunks does anything else happen: progress, signals, checkpoints.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import TrainState, data, disable_jit, jit, parallel, random, scan, train_step, tree
from fdl._training._state import Metrics
from fdl.data import Dataset, Indices
from fdl.metrics import Mean
from train.config import Recipe
from train.recipes import Problem

__all__ = [
    "START",
    "Epoch",
    "Plan",
    "Programs",
    "Progress",
    "advance",
    "chunks",
    "describe",
    "epoch_order",
    "epochs",
    "evaluate",
    "evaluate_eagerly",
    "held_out",
    "make_programs",
    "merge",
    "noticed",
    "plan",
    "planned",
    "step_of",
    "steps_of",
    "timed",
]

CHUNK_SECONDS = 0.5  # how long an interruption may have to wait
COMPILE_SECONDS = 20.0  # compiling takes 10 to 20 s from cold, and has to be won back
EVAL_BATCH = 1000

Carry = tuple[TrainState, Tensor]  # the state, and bool []: has every loss been finite?


class Progress(NamedTuple):
    """How far a run is: what it takes to continue it, besides the state and the options."""

    epoch: int  # the one to work on, from 1
    done: int  # steps of it that are done: whole chunks, or all
    total: dict[str, Mean]  # its metrics so far
    seconds: float  # of training so far: no evaluation, no compiling, no checkpoint


START = Progress(1, 0, {}, 0.0)


class Epoch(NamedTuple):
    """What an epoch, or the part of it that was done, came to."""

    state: TrainState
    metrics: dict[str, float]
    progress: Progress  # within this epoch
    examples: int
    end: str  # "done", "interrupted" or "diverged"

    @property
    def next(self) -> Progress:
        """Where to continue."""
        return (
            START._replace(epoch=self.progress.epoch + 1) if self.end == "done" else self.progress
        )


class Plan(NamedTuple):
    """How a run is to be executed; no result depends on it but for rounding."""

    compile: bool
    chunk: int  # steps
    reason: str


def plan(problem: Problem, config: Recipe, state: TrainState) -> Plan:
    """Time a few eager steps, and choose from that whether to compile and how long a chunk is."""
    steps = steps_of(problem, config)
    order = data.sequential_indices(
        len(problem.train.x), config.batch_size, device=state.key.device
    )
    batch = data.gather(problem.train, (order.index[0], order.mask[0]))
    step = train_step(problem.loss, problem.opt)
    seconds = min(timed(lambda: step(state, batch), state.key.device) for _ in range(3))
    return planned(config, seconds, steps)


def planned(config: Recipe, seconds: float, steps: int) -> Plan:
    """Make the plan of a run whose epochs have so many steps, of so many seconds if eager.

    >>> planned(Recipe(epochs=3), 0.01, 100)
    Plan(compile=False, chunk=50, reason='about 3 s in all, too short to pay for compiling')
    """
    # A power of two: were it to follow each measurement, few runs would find the program of an
    # earlier one in the compiler's cache.
    chunks = 2 ** math.ceil(math.log2(max(1.0, steps * seconds / CHUNK_SECONDS)))
    chunk = math.ceil(steps / min(chunks, steps))
    total = seconds * steps * config.epochs
    if config.compile != "auto":
        return Plan(config.compile == "on", chunk, f"--compile {config.compile}")
    if total < COMPILE_SECONDS:
        about = f"about {total:.0f} s" if total > 1 else "less than 1 s"
        return Plan(False, chunk, f"{about} in all, too short to pay for compiling")
    return Plan(True, chunk, f"eager steps would take about {total:.0f} s")


def describe(plan: Plan) -> str:
    """Say before it happens how a run is executed.

    >>> print(describe(planned(Recipe(), 0.05, 240)))
    compiling, 10 to 20 s the first time (eager steps would take about 120 s) …
    >>> print(describe(planned(Recipe(compile="off"), 0.05, 240)))
    not compiled: --compile off
    """
    if plan.compile:
        return f"compiling, 10 to 20 s the first time ({plan.reason}) …"
    return f"not compiled: {plan.reason}"


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Give the seconds that a call takes."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def step_of(
    problem: Problem, parts: int | None = None, mesh: Any = None
) -> Callable[[Carry, Dataset, Indices], tuple[Carry, Metrics]]:
    """Make the step `(carry, dataset, row of indices) -> (carry, metrics)`.

    A step whose loss is not finite, and every step after it, changes nothing; nor does a step whose
    batch is all padding. `advance` finds the last good state from what comes back.
    """
    step = parallel.train_step(problem.loss, problem.opt, mesh, parts=parts)

    def body(carry: Carry, dataset: Dataset, row: Indices) -> tuple[Carry, Metrics]:
        state, ok = carry
        new, metrics = step(state, data.gather(dataset, row))
        finite, real = metrics["loss"].total.isfinite(), metrics["loss"].count > 0
        taken = ok & finite & real
        state = tree.map(lambda a, b: torch.where(taken, a, b), new, state)
        metrics = tree.map(lambda m: torch.where(taken, m, 0.0), metrics)
        return (state, ok & (finite | ~real)), metrics

    return body


def run_chunk(
    problem: Problem, parts: int | None = None, mesh: Any = None
) -> Callable[..., tuple[Carry, Metrics]]:
    """Make the compiled function `(carry, dataset, indices) -> (carry, metrics)` of many steps."""
    step = step_of(problem, parts, mesh)

    def chunk(carry: Carry, dataset: Dataset, indices: Indices) -> tuple[Carry, Metrics]:
        carry, metrics = scan(lambda carry, row: step(carry, dataset, row), carry, indices)
        return carry, {name: mean.sum() for name, mean in metrics.items()}

    return jit(chunk, donate_argnums=0)


def run_evaluation(problem: Problem, mesh: Any = None) -> Callable[..., Metrics]:
    """Make the compiled function `(state, dataset, indices) -> metrics`."""
    step = parallel.eval_step(problem.loss, mesh)

    def evaluate(state: TrainState, dataset: Dataset, indices: Indices) -> Metrics:
        _, metrics = scan(lambda _, row: ((), step(state, data.gather(dataset, row))), (), indices)
        return {name: mean.sum() for name, mean in metrics.items()}

    return jit(evaluate)


def steps_of(problem: Problem, config: Recipe) -> int:
    """Return how many steps an epoch has."""
    return problem.passes * math.ceil(problem.train.x.shape[0] / config.batch_size)


def epoch_order(problem: Problem, config: Recipe, data_key: Tensor, epoch: int) -> Indices:
    """Shuffle the examples of an epoch, anew for each pass over the training set.

    An epoch of ten passes has the order of ten epochs of one.

    Args:
        problem: has the training set, and the number of passes.
        config: has the batch size.
        data_key: pass p of the run, counted from 0, is shuffled by `fold_in(data_key, p)`.
        epoch: from 1.
    """
    n, first = problem.train.x.shape[0], (epoch - 1) * problem.passes
    passes = [
        data.epoch_indices(random.fold_in(data_key, first + i), n, config.batch_size)
        for i in range(problem.passes)
    ]
    return tree.map(lambda *rows: torch.cat(rows), *passes)


def chunks(indices: Indices, length: int) -> list[Indices]:
    """Cut an epoch into chunks of one length, the last filled with steps of padding only.

    >>> [c.mask.tolist() for c in chunks(data.sequential_indices(5, 2), 2)]
    [[[True, True], [True, True]], [[True, False], [False, False]]]
    """
    steps, batch = indices.index.shape
    missing = -steps % length
    index = torch.cat([indices.index, indices.index.new_zeros(missing, batch)])
    # Whole batches come without a mask; steps of padding need one.
    mask = indices.mask if indices.mask.numel() else torch.ones_like(indices.index).bool()
    mask = torch.cat([mask, mask.new_zeros(missing, batch)])
    return [Indices(*pair) for pair in zip(index.split(length), mask.split(length), strict=True)]


class Programs(NamedTuple):
    """The two functions a run is made of, and the processes they are for, None if one."""

    train: Callable[..., tuple[Carry, Metrics]]  # (carry, dataset, indices)
    evaluate: Callable[..., Metrics]  # (state, dataset, indices)
    mesh: Any = None


def make_programs(
    problem: Problem, config: Recipe, plan: Plan, state: TrainState, mesh: Any = None
) -> Programs:
    """Make the functions of a run and, if the plan says so, compile them now.

    A chunk of nothing but padding changes nothing, and has them compiled.
    """
    programs = Programs(run_chunk(problem, config.parts, mesh), run_evaluation(problem, mesh), mesh)
    if plan.compile:
        size = 1 if mesh is None else mesh.size()
        shape, device = (plan.chunk, config.batch_size // size), state.key.device
        padding = Indices(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )
        programs.train(_first_carry(tree.map(torch.clone, state)), problem.train, padding)
        for _, dataset in held_out(problem):
            evaluate(programs, state, dataset)
    return programs


def _first_carry(state: TrainState) -> Carry:
    """Start a run: every loss so far has been finite."""
    return state, torch.ones((), dtype=torch.bool, device=state.key.device)


def epochs(
    problem: Problem,
    config: Recipe,
    plan: Plan,
    programs: Programs,
    state: TrainState,
    data_key: Tensor,
    progress: Progress,
    *,
    stopped: Callable[[], bool],
    on_chunk: Callable[[TrainState, Progress, int, float], None],
) -> Iterator[Epoch]:
    """Train and yield after each epoch; the last one says how the run ended.

    Args:
        problem: what to train.
        config: the recipe.
        plan: how to execute it.
        programs: from `make_programs`.
        state: where to start; donated.
        data_key: epoch e's order comes from `fold_in(data_key, e)`.
        progress: how far `state` is, `START` for a new one.
        stopped: asked after each chunk whether to end.
        on_chunk: told after each chunk the state, how far it is, the steps of an epoch, the loss.
            The state is given away afterwards.
    """
    with nullcontext() if plan.compile else disable_jit():
        while progress.epoch <= config.epochs:
            order = epoch_order(problem, config, data_key, progress.epoch)
            steps, end = len(order.index), "done"
            for part in chunks(order, plan.chunk)[math.ceil(progress.done / plan.chunk) :]:
                state, metrics, seconds, sound = advance(problem, programs, state, part)
                progress = Progress(
                    progress.epoch,
                    min(progress.done + plan.chunk, steps),
                    merge(progress.total, metrics),
                    progress.seconds + seconds,
                )
                if not sound:
                    end = "diverged"
                    break
                on_chunk(state, progress, steps, metrics["loss"].value.item())
                if stopped():
                    end = "interrupted"
                    break
            found = {name: mean.value.item() for name, mean in progress.total.items()}
            if end == "done":
                for part_name, dataset in held_out(problem):
                    tested = evaluate(programs, state, dataset)
                    found |= {f"{part_name}_{name}": value for name, value in tested.items()}
            epoch = Epoch(state, found, progress, int(progress.total["loss"].count), end)
            yield epoch
            if end != "done":
                return
            progress = epoch.next


def advance(
    problem: Problem, programs: Programs, state: TrainState, part: Indices
) -> tuple[TrainState, Metrics, float, bool]:
    """Train on one chunk; the state is donated.

    An update that destroys the weights shows in the loss of the step after it. Then the chunk is
    done again without that update, and what comes back is the last state of a finite loss.

    Returns:
        The state, the metrics of the steps that led to it, the seconds they took, and whether it
        is sound: whether the chunk was done to its end, to a finite loss.
    """
    before, rows = tree.map(torch.clone, state), parallel.own_rows(part, programs.mesh)
    start = time.perf_counter()
    (after, ok), metrics = programs.train(_first_carry(state), problem.train, rows)
    finite = bool(ok)  # waits for the device
    seconds = time.perf_counter() - start
    last = int(part.mask.any(1).sum()) - 1  # no padding but at the end
    if finite and _is_sound(problem, programs, after, Indices(rows.index[last], rows.mask[last])):
        return after, metrics, seconds, True
    good = max(0, int(after.step - before.step) - 1)
    mask = rows.mask.clone()
    mask[good:] = False
    again = programs.train(_first_carry(before), problem.train, Indices(rows.index, mask))
    (after, _), metrics = again
    return after, metrics, seconds, False


def _is_sound(problem: Problem, programs: Programs, state: TrainState, row: Indices) -> bool:
    """Find out whether the loss on a batch, parameters and buffers are finite."""
    with disable_jit():
        batch = data.gather(problem.train, row)
        loss = parallel.eval_step(problem.loss, programs.mesh)(state, batch)["loss"]
    leaves = tree.leaves((state.params, state.buffers))
    return bool(torch.stack([x.isfinite().all() for x in [loss.value, *leaves]]).all())


def held_out(problem: Problem) -> list[tuple[str, Dataset]]:
    """List what a problem has to evaluate on, by name."""
    both = [("validation", problem.validation), ("test", problem.test)]
    return [(name, dataset) for name, dataset in both if dataset is not None]


def merge(total: dict[str, Mean], metrics: Metrics) -> dict[str, Mean]:
    """Add the metrics of further steps to those so far, which are {} at first."""
    return {name: total[name] + mean if total else mean for name, mean in metrics.items()}


def evaluate(programs: Programs, state: TrainState, dataset: Dataset) -> dict[str, float]:
    """Average the metrics of a state over a data set."""
    size = 1 if programs.mesh is None else programs.mesh.size()
    batch = math.ceil(EVAL_BATCH / size) * size
    rows = data.sequential_indices(len(dataset.x), batch, device=dataset.x.device)
    found = programs.evaluate(state, dataset, parallel.own_rows(rows, programs.mesh))
    return {name: mean.value.item() for name, mean in found.items()}


def evaluate_eagerly(problem: Problem, state: TrainState, dataset: Dataset) -> dict[str, float]:
    """Average the metrics of a state over a data set, once: compiling would not pay."""
    with disable_jit():
        return evaluate(Programs(run_chunk(problem), run_evaluation(problem)), state, dataset)


@contextmanager
def noticed(number: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Turn a signal into a question that answers True from then on; a second Ctrl-C interrupts.

    >>> with noticed(signal.SIGTERM) as terminated:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     terminated()
    True
    """
    received = False

    def handler(signum: int, frame: Any) -> None:
        nonlocal received
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received = True

    old = signal.signal(number, handler)
    try:
        yield lambda: received
    finally:
        signal.signal(number, old)
