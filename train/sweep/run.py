"""`python -m train sweep RECIPE --grid …`: every point of a grid, many models at once.

A point equals the ordinary run with its options: same parameters, data order and masks. Points are
trained in groups, one group after the other with one program; processes started by `torchrun`
divide the groups among them. Each group has a folder, which is complete or absent, so a resumed
sweep trains the groups that are missing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fdl
from fdl import TrainState, data, parallel, population, tree
from fdl.data import Indices
from fdl.parallel._group import on_all, on_first
from train import config as configs
from train import launch, loop, planning, plots, recipes, resume, run_folder
from train.compiling import announced
from train.config import RECIPES, SWEEPS, Images, Recipe, Sweep
from train.planning import Plan
from train.run import next_commands
from train.sweep import grid, results
from train.sweep.grid import Axis
from train.sweep.group import (
    Point,
    Setting,
    first_carry,
    gather,
    make_programs,
    order,
    train_group,
)
from train.sweep.results import Result

__all__ = ["run"]

PATIENCE = timedelta(days=30)  # how long the first process to end may wait for the last


class Share(NamedTuple):
    """The processes of a sweep."""

    mesh: Any
    group: Any  # of the mesh; None for a single process
    processes: launch.Processes


def run(sweep: Sweep) -> int:
    """Train the whole grid, alone or with the processes started by `torchrun`.

    Returns:
        An exit code, see `commands.main`.
    """
    processes = launch.read_torchrun_env()
    with launch.process_group(processes, sweep.recipe.device, PATIENCE) as mesh:
        share = Share(mesh, mesh and mesh.get_group(), processes)
        try:
            setting, base, axes, groups, size = prepare(sweep, share)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            with announced():
                return train(setting, base, axes, groups, size, share)
        except OSError as error:
            print(
                f"error: cannot write to {setting.folder}: {error}\n"
                "what was saved before is intact",
                file=sys.stderr,
            )
            return os.EX_IOERR


def prepare(
    sweep: Sweep, share: Share
) -> tuple[Setting, Recipe, list[Axis], list[list[Point]], int]:
    """Set up a sweep, new or resumed; all errors in the options are raised here."""
    options: Any = launch.after_restart(sweep.recipe, share.processes)
    name = next(name for name, kind in SWEEPS.items() if type(options) is kind)
    past = None
    if options.resume is not None:
        given = options.resume
        folder = on_first(share.group, lambda: run_folder.newest(given, "sweep"))
        past = run_folder.read_sweep(folder)
        options = resume.resumed_options(name, folder, past, sys.argv[3:], resume.SWEEP_MAY_CHANGE)
    configs.check(options)
    launch.check_shares(options, launch.Processes())  # a member trains in one process
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise ValueError(f"--memory must be positive, got {options.memory}")
    axes = grid.parse(options.grid)
    kind = RECIPES[name]
    base = kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(kind)})
    points = grid.points(axes)
    for point in points:
        grid.at(base, point)  # raises where one is out of its range
    device = launch.local_device(recipes.find_device(base.device), share.processes)
    # With the largest values: a rate of 0 would be left out of the state.
    config = grid.at(base, {axis.name: max(axis.values) for axis in axes})
    problem, state, _ = recipes.set_up(config, device, share.mesh)
    if past is not None and past.data != problem.data:
        raise ValueError(
            f"--resume {options.resume}: the sweep was trained on {past.data}, got {problem.data}"
        )
    if past is not None:
        problem = problem._replace(passes=past.passes)
    parallel.check_replicated({"option": dataclasses.asdict(options)}, share.mesh)
    own_order = any(axis.name == "seed" for axis in axes)
    size, line = on_first(
        share.group,
        lambda: fit(problem, config, state, len(points), options.memory, share.processes),
    )
    if past is not None:
        size, line = past.size, f"groups of {past.size}, as when the sweep began"
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    folder = options.resume or on_first(
        share.group, lambda: run_folder.make(base.out, f"sweep-{name}")
    )
    own_data = own_order and not isinstance(config, Images)
    programs = make_programs(
        problem,
        base.parts,
        convolves=any(leaf.ndim == 4 for leaf in tree.leaves(state.params)),
        own_data=own_data,
        own_order=own_order,
    )
    plan = past.plan if past else Plan(False, 1, "")
    setting = Setting(name, config, problem, own_order, own_data, plan, folder, programs)
    several = f", {share.processes.size} processes" if share.group is not None else ""
    print(f"sweep of {name}: {len(points)} points; {device}{several}", problem.data, sep="\n")
    print(*recipes.notes(problem), line, sep="\n")
    if past is None:
        turns = math.ceil(len(groups) / share.processes.size)
        plan = on_first(share.group, lambda: plan_of(setting, base, groups[0], turns))
        setting = setting._replace(plan=plan)
        if share.processes.rank == 0:
            run_folder.write_sweep(folder, name, options, problem, plan, size)
    print(planning.describe(plan))
    return setting, base, axes, groups, size


def fit(
    problem: recipes.Problem,
    config: Recipe,
    state: TrainState,
    count: int,
    gigabytes: float | None,
    processes: launch.Processes,
) -> tuple[int, str]:
    """Choose the number of members in a group, and explain it in a line.

    Every process gets the same number of groups. The memory of a member is bounded by all that one
    of its steps allocates.
    """
    index, mask = data.sequential_indices(
        min(config.batch_size, len(problem.train.x)), config.batch_size, device=state.key.device
    )
    step, ok = (
        loop.step_of(problem, config.parts),
        torch.ones((), dtype=torch.bool, device=state.key.device),
    )
    with _Counting() as counting:
        step((state, ok), problem.train, Indices(index[0], mask[0]))
    each = counting.bytes + 3 * sum(leaf.nbytes for leaf in tree.leaves(state))
    half = free(state.key.device) / 2 / processes.local_size
    may = half if gigabytes is None else gigabytes * 1e9
    groups = math.ceil(count / max(1, int(may / each)))
    groups = min(count, math.ceil(groups / processes.size) * processes.size)
    size = math.ceil(count / groups)
    line = f"memory: at most {each / 1e6:.3g} MB a member, {may / 1e9:.3g} GB allowed: "
    return size, line + (f"{groups} groups of {size}" if groups > 1 else "all at once")


class _Counting(TorchDispatchMode):
    """Add up the memory of the results of all operations."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.bytes += sum(leaf.nbytes for leaf in tree.leaves(result) if isinstance(leaf, Tensor))
        return result


def free(device: torch.device) -> int:
    """Return the free memory of a device, in bytes.

    >>> free(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_of(setting: Setting, config: Recipe, points: Sequence[Point], groups: int) -> Plan:
    """Try an eager step of a group, and choose a plan as for an ordinary run."""
    members = gather(setting, points)
    first = order(setting, members.data_keys, 1)[0]  # chunks of one step so far
    carry = first_carry(members.states)
    with fdl.disable_jit():
        cost = planning.cost_of(
            lambda: setting.programs.train(carry, members.dataset, first), first.index.device
        )
    steps = planning.steps_per_epoch(setting.problem, config)
    # A chunk is of one group; compiling pays for all.
    return planning.choose_plan(config, cost._replace(usual=cost.usual * groups), steps)


def train(
    setting: Setting,
    base: Recipe,
    axes: list[Axis],
    groups: list[list[Point]],
    size: int,
    share: Share,
) -> int:
    """Train this process's share of the groups that are missing, and print the results of all."""
    folder = setting.folder
    done = on_first(share.group, lambda: set(results.finished(folder)))
    missing = [i for i in range(len(groups)) if i not in done]
    if done:
        print(f"{len(done)} of {len(groups)} groups are done")
    with (
        loop.signal_flag(signal.SIGTERM) as terminated,
        loop.signal_flag(signal.SIGINT) as interrupted,
        tqdm(unit="step", leave=False, disable=None, ncols=79) as bar,
        nullcontext() if setting.plan.compile else fdl.disable_jit(),
    ):

        def stopped() -> bool:
            return interrupted() or terminated()

        for i in missing[share.processes.rank :: share.processes.size]:
            if stopped():
                break
            # The last group is filled up with copies, so that all groups share one program.
            points = groups[i]
            filled = [*points, *[points[-1]] * (size - len(points))]
            bar.set_description(f"group {i + 1}/{len(groups)}")
            states, progress, trained = train_group(setting, base, filled, bar, stopped)
            trained = trained[: len(points)]
            with results.group_folder(folder, i) as temporary:
                results.write_results(temporary, trained, finished=not stopped())
                best = results.best_of(trained)
                if best is not None:
                    j = next(j for j, result in enumerate(trained) if result is best)
                    state = population.member(states, j)
                    save_best(temporary / "best", setting, base, best, state, progress[j])
            if share.group is None:
                results.merge(folder)
        ended = any(on_all(share.group, stopped))
        if share.processes.rank == 0:
            conclude(setting, axes)
    all_results = results.results_in(folder)
    if ended:
        print("interrupted: all results so far are saved; --resume continues", file=sys.stderr)
        return os.EX_TEMPFAIL if terminated() else 130
    return 0 if any(result.ok for result in all_results) else 1


def conclude(setting: Setting, axes: list[Axis]) -> None:
    """Print and draw the results of all groups."""
    points = results.merge(setting.folder)
    print(results.table(axes, points))
    best = results.best_of(points)
    if best is None:
        return
    title, metric = f"{setting.name}: {len(points)} models", results.chosen_by(best)
    values = results.best_values(axes, points)
    plots.draw_sweep(setting.folder / "sweep.png", title, metric, axes, values)
    folder = setting.folder / "best"
    print(results.summary(best, results.last_line(folder)))
    print(
        f"results.jsonl, sweep.png and the best, as an ordinary run, are in\n    {setting.folder}"
    )
    print("next, for example:")
    print(*next_commands(setting.name, run_folder.read_run(folder).config, folder), sep="\n")


def save_best(
    folder: Path,
    setting: Setting,
    base: Recipe,
    best: Result,
    state: TrainState,
    progress: loop.Progress,
) -> None:
    """Save the best of a group, with the state of an ordinary run, and test it.

    The test set has no part in the choice, unless there is no validation set.
    """
    config, problem = grid.at(base, best.point), setting.problem
    if 0 in best.point.values() or setting.own_data:
        problem = recipes.set_up(config, state.key.device)[0]
        state = results.only(state, problem.opt)
    if problem.validation is not None and problem.test is not None:
        tested = loop.evaluate_eagerly(problem, state, problem.test)
        last = best.history[-1] | {f"test_{name}": value for name, value in tested.items()}
        best = best._replace(history=[*best.history[:-1], last])
    problem = problem._replace(passes=setting.problem.passes)
    results.save_run(folder, setting.name, config, problem, setting.plan, best, state, progress)
