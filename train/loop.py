"""The loop around the pure step: chunks, evaluation, interruption.

An epoch is a `scan` over rows of indices, cut into chunks of one length so that one program serves
all of them. Progress, signals and checkpoints are handled between chunks.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import TrainState, data, disable_jit, jit, parallel, random, scan, tree
from fdl._training._state import Metrics
from fdl.data import Dataset, Indices
from fdl.metrics import Mean
from train.config import Recipe
from train.planning import Plan
from train.recipes import Problem

__all__ = [
    "START",
    "Epoch",
    "Programs",
    "Progress",
    "advance",
    "chunks",
    "epoch_order",
    "epochs",
    "evaluate",
    "evaluate_eagerly",
    "held_out",
    "make_programs",
    "merge",
    "signal_flag",
    "step_of",
]

EVAL_BATCH = 1000

Carry = tuple[TrainState, Tensor]  # the state, and bool []: every loss so far was finite


class Progress(NamedTuple):
    """Progress of a run; with the state and the options, it is enough to continue."""

    epoch: int  # the current one, from 1
    done: int  # steps of this epoch that are done: whole chunks, or all of them
    total: dict[str, Mean]  # metrics of this epoch so far
    seconds: float  # training time of this epoch, without evaluation, compiling and checkpoints


START = Progress(1, 0, {}, 0.0)


class Epoch(NamedTuple):
    """The result of an epoch, or of the part of it that was done."""

    state: TrainState
    metrics: dict[str, float]
    progress: Progress  # within this epoch
    examples: int
    end: str  # "done", "interrupted" or "diverged"

    @property
    def next(self) -> Progress:
        """The progress to continue from."""
        return (
            START._replace(epoch=self.progress.epoch + 1) if self.end == "done" else self.progress
        )


def step_of(
    problem: Problem, parts: int | None = None, mesh: Any = None
) -> Callable[[Carry, Dataset, Indices], tuple[Carry, Metrics]]:
    """Make the step `(carry, dataset, row of indices) -> (carry, metrics)`.

    A step whose loss is not finite, and every step after it, changes nothing; nor does a step whose
    batch is all padding. `advance` finds the last good state from the result.
    """
    step = parallel.train_step(problem.loss, problem.opt, mesh, microbatches=parts)

    def body(carry: Carry, dataset: Dataset, row: Indices) -> tuple[Carry, Metrics]:
        state, ok = carry
        new, metrics = step(state, data.to_float(data.batch(dataset, row)))
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
        _, metrics = scan(
            lambda _, row: ((), step(state, data.to_float(data.batch(dataset, row)))), (), indices
        )
        return {name: mean.sum() for name, mean in metrics.items()}

    return jit(evaluate)


def epoch_order(problem: Problem, config: Recipe, data_key: Tensor, epoch: int) -> Indices:
    """Return the order of an epoch, with a new shuffle for each pass over the training set.

    An epoch of ten passes has the order of ten epochs of one pass.

    Args:
        problem: gives the training set and the number of passes.
        config: gives the batch size.
        data_key: pass p of the run, counted from 0, is shuffled with `fold_in(data_key, p)`.
        epoch: number of the epoch, from 1.
    """
    n, first = problem.train.x.shape[0], (epoch - 1) * problem.passes
    passes = [
        data.epoch_indices(random.fold_in(data_key, first + i), n, config.batch_size)
        for i in range(problem.passes)
    ]
    return tree.map(lambda *rows: torch.cat(rows), *passes)


def chunks(indices: Indices, length: int) -> list[Indices]:
    """Cut an epoch into chunks of one length; the last one is filled up with steps of padding.

    >>> [c.mask.tolist() for c in chunks(data.sequential_indices(5, 2), 2)]
    [[[True, True], [True, True]], [[True, False], [False, False]]]
    """
    steps, batch = indices.index.shape
    missing = -steps % length
    index = torch.cat([indices.index, indices.index.new_zeros(missing, batch)])
    # Full batches have no mask; steps of padding need one.
    mask = indices.mask if indices.mask.numel() else torch.ones_like(indices.index).bool()
    mask = torch.cat([mask, mask.new_zeros(missing, batch)])
    return [Indices(*pair) for pair in zip(index.split(length), mask.split(length), strict=True)]


class Programs(NamedTuple):
    """The two functions of a run, and the mesh of processes that call them; None for one."""

    train: Callable[..., tuple[Carry, Metrics]]  # (carry, dataset, indices)
    evaluate: Callable[..., Metrics]  # (state, dataset, indices)
    mesh: Any = None


def make_programs(
    problem: Problem, config: Recipe, plan: Plan, state: TrainState, mesh: Any = None
) -> Programs:
    """Make the functions of a run and, if the plan says so, compile them now.

    They are compiled by a chunk of padding, which changes nothing.
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
    """Return the carry that a chunk starts from."""
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
) -> Generator[Epoch]:
    """Train and yield after each epoch; the `end` of the last one tells how the run ended.

    Args:
        problem: the problem to train.
        config: the options of the recipe.
        plan: how to execute the run.
        programs: the result of `make_programs`.
        state: the state to start from; donated.
        data_key: the key of `epoch_order`.
        progress: how far `state` is; `START` for a new run.
        stopped: called after each chunk; True ends the run.
        on_chunk: called after each chunk with the state, the progress, the number of steps in an
            epoch and the loss. The state is donated afterwards.
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
            averages = {name: mean.value.item() for name, mean in progress.total.items()}
            if end == "done":
                for part_name, dataset in held_out(problem):
                    scores = evaluate(programs, state, dataset)
                    averages |= {f"{part_name}_{name}": value for name, value in scores.items()}
            epoch = Epoch(state, averages, progress, int(progress.total["loss"].count), end)
            yield epoch
            if end != "done":
                return
            progress = epoch.next


def advance(
    problem: Problem, programs: Programs, state: TrainState, part: Indices
) -> tuple[TrainState, Metrics, float, bool]:
    """Train on one chunk; the state is donated.

    An update that destroys the weights shows in the loss of the next step. The chunk is then done
    again without that update, and the result is the last state with a finite loss.

    Returns:
        The state, the metrics of the steps that led to it, the seconds they took, and True if the
        whole chunk was done and ended with a finite loss.
    """
    before, rows = tree.map(torch.clone, state), parallel.own_rows(part, programs.mesh)
    start = time.perf_counter()
    (after, ok), metrics = programs.train(_first_carry(state), problem.train, rows)
    finite = bool(ok)  # waits for the device
    seconds = time.perf_counter() - start
    last = int(part.mask.any(1).sum()) - 1  # padding is at the end
    if finite and _is_sound(problem, programs, after, Indices(rows.index[last], rows.mask[last])):
        return after, metrics, seconds, True
    good = max(0, int(after.step - before.step) - 1)
    mask = rows.mask.clone()
    mask[good:] = False
    again = programs.train(_first_carry(before), problem.train, Indices(rows.index, mask))
    (after, _), metrics = again
    return after, metrics, seconds, False


def _is_sound(problem: Problem, programs: Programs, state: TrainState, row: Indices) -> bool:
    """Return True if the loss on a batch, the parameters and the buffers are finite."""
    with disable_jit():
        batch = data.to_float(data.batch(problem.train, row))
        loss = parallel.eval_step(problem.loss, programs.mesh)(state, batch)["loss"]
    leaves = tree.leaves((state.params, state.buffers))
    return bool(torch.stack([x.isfinite().all() for x in [loss.value, *leaves]]).all())


def held_out(problem: Problem) -> list[tuple[str, Dataset]]:
    """List the validation and test set of a problem, by name, where it has them."""
    both = [("validation", problem.validation), ("test", problem.test)]
    return [(name, dataset) for name, dataset in both if dataset is not None]


def merge(total: dict[str, Mean], metrics: Metrics) -> dict[str, Mean]:
    """Add metrics to a total, which is {} at first."""
    return {name: total[name] + mean if total else mean for name, mean in metrics.items()}


def evaluate(programs: Programs, state: TrainState, dataset: Dataset) -> dict[str, float]:
    """Average the metrics of a state over a data set."""
    size = 1 if programs.mesh is None else programs.mesh.size()
    batch = math.ceil(EVAL_BATCH / size) * size
    rows = data.sequential_indices(len(dataset.x), batch, device=dataset.x.device)
    metrics = programs.evaluate(state, dataset, parallel.own_rows(rows, programs.mesh))
    return {name: mean.value.item() for name, mean in metrics.items()}


def evaluate_eagerly(problem: Problem, state: TrainState, dataset: Dataset) -> dict[str, float]:
    """Average the metrics of a state over a data set without compiling, for a single use."""
    with disable_jit():
        return evaluate(Programs(run_chunk(problem), run_evaluation(problem)), state, dataset)


@contextmanager
def signal_flag(number: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Catch a signal, and yield a function that returns True once it was received.

    A second SIGINT raises KeyboardInterrupt.

    >>> with signal_flag(signal.SIGTERM) as terminated:
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
