"""`python -m train sweep RECIPE --grid …`: every point of a grid, many models at once.

A point is the ordinary run with its options: same parameters, data order and masks. Members of a
group share every instruction; groups follow one another and share one program.
"""

from __future__ import annotations  # Dynamo would run those of nested functions

import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fdl
from fdl import TrainState, data, population, random, tree
from fdl.data import Dataset, Indices
from fdl.metrics import Mean
from fdl.training import Metrics
from train import grid, loop, outcome, recipes, report
from train.config import RECIPES, SWEEPS, Images, Recipe, Sweep
from train.grid import Axis, Value
from train.outcome import Result

__all__ = ["Members", "run"]

Point = dict[str, Value]


class Members(NamedTuple):
    """A group of points, ready to train: every leaf has the first axis [members]."""

    states: TrainState
    data_keys: Tensor  # [members, 2]
    dataset: Dataset  # [members, …] where data are drawn, for each seed its own


class Setting(NamedTuple):
    """What all groups have in common."""

    name: str
    config: Recipe  # of a run in the middle of the grid
    problem: recipes.Problem
    own_order: bool  # does a member have its own order of the data,
    own_data: bool  # and its own data?
    plan: loop.Plan
    folder: Path
    programs: loop.Programs


def run(sweep: Sweep) -> int:
    """Train the whole grid; exit codes are those of `main`.

    Raises:
        ValueError: the grid or another option is wrong.
        OSError: data are missing, or the folder cannot be made.
    """
    options = sweep.recipe
    name = next(name for name, kind in SWEEPS.items() if type(options) is kind)
    if options.resume is not None:
        raise ValueError(
            "--resume: a sweep does not go on; what it finished is in its results.jsonl, and its "
            "best run goes on by itself: python -m train RECIPE --resume FOLDER/best"
        )
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise ValueError(f"--memory must be positive, got {options.memory}")
    axes = grid.parse(options.grid)
    kind = RECIPES[name]
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(kind)}
    base = kind(**given)
    points = grid.points(axes)
    for point in points:
        grid.at(base, point)  # raises where one is out of its range
    device = recipes.find_device(base.device)
    # With the largest values: a rate of 0 would be left out of the state.
    config = grid.at(base, {axis.name: max(axis.values) for axis in axes})
    problem, state, _ = recipes.set_up(config, device)
    own_order = any(axis.name == "seed" for axis in axes)
    size, line = fit(problem, config, state, len(points), options.memory)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    folder = report.open_run(base.out, f"sweep-{name}")
    own_data = own_order and not isinstance(config, Images)
    setting = Setting(
        name,
        config,
        problem,
        own_order,
        own_data,
        loop.Plan(False, 1, ""),
        folder,
        make_programs(
            problem,
            convolves=any(leaf.ndim == 4 for leaf in tree.leaves(state.params)),
            own_data=own_data,
            own_order=own_order,
        ),
    )
    print(f"sweep of {name}: {len(points)} points; {problem.data}; {device}\n{line}")
    setting = setting._replace(plan=plan(setting, base, groups[0], len(groups)))
    report.write_sweep(folder, name, base, options.grid, setting.plan)
    print(f"{'compiled' if setting.plan.compile else 'not compiled'}: {setting.plan.reason}")
    try:
        return train(setting, base, axes, groups, size)
    except OSError as error:
        print(
            f"error: cannot write to {folder}: {error}\nwhat was saved before is intact",
            file=sys.stderr,
        )
        return os.EX_IOERR


def fit(
    problem: recipes.Problem,
    config: Recipe,
    state: TrainState,
    count: int,
    gigabytes: float | None,
) -> tuple[int, str]:
    """Say how many members a group has, and why.

    A member takes at most what one step of it makes, none of it ever freed.
    """
    index, mask = data.sequential_indices(
        min(config.batch_size, len(problem.train.x)), config.batch_size, device=state.key.device
    )
    step, ok = loop.step_of(problem), torch.ones((), dtype=torch.bool, device=state.key.device)
    with _Counting() as counting:
        step((state, ok), problem.train, Indices(index[0], mask[0]))
    each = counting.bytes + 3 * sum(leaf.nbytes for leaf in tree.leaves(state))
    may = free(state.key.device) / 2 if gigabytes is None else gigabytes * 1e9
    groups = math.ceil(count / max(1, int(may / each)))
    size = math.ceil(count / groups)
    line = f"memory: at most {each / 1e6:.3g} MB a member, {may / 1e9:.3g} GB allowed: "
    return size, line + (f"{groups} groups of {size}" if groups > 1 else "all at once")


class _Counting(TorchDispatchMode):
    """Adds up the memory of whatever an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.bytes += sum(leaf.nbytes for leaf in tree.leaves(result) if isinstance(leaf, Tensor))
        return result


def free(device: torch.device) -> int:
    """Ask for the free memory of a device, in bytes.

    >>> free(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_programs(
    problem: recipes.Problem, *, convolves: bool, own_data: bool, own_order: bool
) -> loop.Programs:
    """Make the functions of `loop.Programs` for a population: a scan of the vmapped step."""
    # Many models' convolutions are one in groups, which takes the CPU twice as long.
    each = population.in_turn if convolves and not problem.train.x.is_cuda else vmap
    # What all members share has no axis, so that it is read and looked up once.
    step = each(loop.step_of(problem), (0, 0 if own_data else None, 0 if own_order else None))
    score = each(fdl.eval_step(problem.loss), (0, None))

    def chunk(carry: loop.Carry, dataset: Dataset, rows: Indices) -> tuple[loop.Carry, Metrics]:
        carry, metrics = fdl.scan(lambda carry, row: step(carry, dataset, row), carry, rows)
        return carry, _total(metrics)

    def evaluate(states: TrainState, dataset: Dataset, rows: Indices) -> Metrics:
        found = fdl.scan(lambda _, row: ((), score(states, data.gather(dataset, row))), (), rows)[1]
        return _total(found)

    return loop.Programs(fdl.jit(chunk, donate=0), fdl.jit(evaluate))


def _total(metrics: Metrics) -> Metrics:
    """Add up over the steps, the first axis; that of the members stays."""
    return {name: Mean(m.total.sum(0), m.count.sum(0)) for name, m in metrics.items()}


def gather(setting: Setting, points: Sequence[Point]) -> Members:
    """Draw the states, and where they depend on the seed the data, of some points."""
    device = setting.problem.train.x.device
    seeds = [int(point.get("seed", setting.config.seed)) for point in points]
    keys = torch.stack([random.split(random.key(seed, device), 3) for seed in seeds])
    rates = {
        name: torch.tensor([float(point[name]) for point in points], dtype=torch.float64)
        for name in points[0]
        if name != "seed"
    }
    problem, dataset = setting.problem, setting.problem.train
    if setting.own_data:
        dataset = tree.stack([recipes.build(setting.config, key).train for key in keys[:, 2]])
    states = population.create(problem.model, problem.opt, keys[:, 0], rates)
    return Members(states, keys[:, 1], dataset)


def order(setting: Setting, data_keys: Tensor, epoch: int) -> list[Indices]:
    """Cut the order of an epoch into chunks: rows [steps, batch], or [steps, members, batch]."""
    n = setting.problem.train.x.shape[0]
    keys = data_keys if setting.own_order else data_keys[:1]
    chunks = [
        loop.chunks(
            data.epoch_indices(random.fold_in(key, epoch - 1), n, setting.config.batch_size),
            setting.plan.chunk,
        )
        for key in keys
    ]
    if not setting.own_order:
        return chunks[0]
    return [
        Indices(*(torch.stack(leaves, 1) for leaves in zip(*parts, strict=True)))
        for parts in zip(*chunks, strict=True)
    ]


def plan(setting: Setting, config: Recipe, points: Sequence[Point], groups: int) -> loop.Plan:
    """Time a few eager steps of a group, and plan as for an ordinary run."""
    members = gather(setting, points)
    first = order(setting, members.data_keys, 1)[0]  # of one step, as yet
    carry = _first_carry(members.states)
    with fdl.disable_jit():
        seconds = min(
            loop.timed(
                lambda: setting.programs.train(carry, members.dataset, first), first.index.device
            )
            for _ in range(2)
        )
    steps = math.ceil(setting.problem.train.x.shape[0] / config.batch_size)
    return loop.planned(config, seconds * groups, steps)._replace(
        chunk=loop.planned(config, seconds, steps).chunk
    )


def _first_carry(states: TrainState) -> loop.Carry:
    return states, torch.ones(len(states.key), dtype=torch.bool, device=states.key.device)


def train(
    setting: Setting, base: Recipe, axes: list[Axis], groups: list[list[Point]], size: int
) -> int:
    """Train the groups, and keep after each what it came to."""
    results: list[Result] = []
    with (
        loop.noticed(signal.SIGTERM) as terminated,
        loop.noticed(signal.SIGINT) as interrupted,
        tqdm(unit="step", leave=False, disable=None, ncols=79) as bar,
        nullcontext() if setting.plan.compile else fdl.disable_jit(),
    ):

        def stopped() -> bool:
            return interrupted() or terminated()

        for number, points in enumerate(groups, 1):
            # The last group is filled up with copies, which nobody looks at: one program for all.
            whole = [*points, *[points[-1]] * (size - len(points))]
            bar.set_description(f"group {number}/{len(groups)}")
            states, at, found = train_group(setting, base, whole, bar, stopped)
            results += found[: len(points)]
            for result in found[: len(points)]:
                outcome.append(setting.folder / "results.jsonl", result)
            best = outcome.best_of(results)
            if best is not None and any(best is result for result in found):
                i = next(i for i, result in enumerate(found) if result is best)
                save_best(setting, base, best, population.member(states, i), at[i])
            if stopped():
                break
    print(outcome.table(axes, results))
    if any(result.ok for result in results):
        outcome.draw(setting.folder / "sweep.png", setting.name, axes, results)
        print(f"results.jsonl, sweep.png and the best as an ordinary run in {setting.folder}")
    if stopped():
        print("interrupted: what was done is saved", file=sys.stderr)
        return os.EX_TEMPFAIL if terminated() else 130
    return 0 if any(result.ok for result in results) else 1


def save_best(
    setting: Setting, base: Recipe, best: Result, state: TrainState, progress: loop.Progress
) -> None:
    """Save the best so far in the folder `best`, with the state an ordinary run of it has."""
    config = grid.at(base, best.point)
    if 0 in best.point.values():
        state = outcome.only(state, recipes.set_up(config, state.key.device)[0].opt)
    found, plan = setting.problem.data, setting.plan
    folder = setting.folder / "best"
    outcome.save_run(folder, setting.name, config, found, plan, best, state, progress)


def train_group(
    setting: Setting,
    config: Recipe,
    points: Sequence[Point],
    bar: tqdm,
    stopped: Callable[[], bool],
) -> tuple[TrainState, list[loop.Progress], list[Result]]:
    """Train the members of a group; give their states, how far they are, and their results."""
    members = gather(setting, points)
    carry, histories = _first_carry(members.states), [list[dict[str, Any]]() for _ in points]
    steps = math.ceil(setting.problem.train.x.shape[0] / config.batch_size)
    bar.reset(steps * config.epochs)
    for epoch in range(1, config.epochs + 1):
        start, done, total = time.perf_counter(), 0, dict[str, Mean]()
        for rows in order(setting, members.data_keys, epoch):
            carry, metrics = setting.programs.train(carry, members.dataset, rows)
            total = loop.merge(total, metrics)
            done = min(done + setting.plan.chunk, steps)
            bar.n = (epoch - 1) * steps + done
            bar.set_postfix_str(f"loss {metrics['loss'].value.nan_to_num().min().item():.4f}")
            if stopped() or not carry[1].any():
                break
        seconds = time.perf_counter() - start
        scores = score(setting, carry[0])
        for i, history in enumerate(histories):
            history.append(_record(population.member((carry[0].step, total, scores), i), seconds))
            history[-1] = {"epoch": epoch, **history[-1]}
        if stopped() or not carry[1].any():
            break
    # On a divergence nobody asks how far a run is.
    whole = loop.START._replace(epoch=epoch + 1)
    at = [
        whole if done == steps else loop.Progress(epoch, done, population.member(total, i), seconds)
        for i in range(len(points))
    ]
    results = [
        Result(point, ok, step, history)
        for point, ok, step, history in zip(
            points, carry[1].tolist(), carry[0].step.tolist(), histories, strict=True
        )
    ]
    return carry[0], at, results


def score(setting: Setting, states: TrainState) -> dict[str, Mean]:
    """Average the metrics of every member over the test set, if there is one."""
    if setting.problem.test is None:
        return {}
    n, device = len(setting.problem.test.x), states.key.device
    rows = data.sequential_indices(n, loop.EVAL_BATCH, device=device)
    found = setting.programs.evaluate(states, setting.problem.test, rows)
    return {f"test_{name}": mean for name, mean in found.items()}


def _record(row: tuple[Tensor, dict[str, Mean], dict[str, Mean]], seconds: float) -> dict[str, Any]:
    """Make a member's line of `metrics.jsonl`, its seconds those of the whole group."""
    step, total, tested = row
    return {
        "step": int(step),
        **{name: mean.value.item() for name, mean in (total | tested).items()},
        "seconds": seconds,
        "examples_per_second": total["loss"].count.item() / seconds,
    }
