"""A group of a sweep's points, trained at once: members share every instruction."""

from __future__ import annotations  # Dynamo would run those of nested functions

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

import fdl
from fdl import TrainState, data, population, random, tree
from fdl.data import Dataset, Indices
from fdl.metrics import Mean
from fdl.training import Metrics
from train import loop, recipes
from train.config import Recipe
from train.grid import Value
from train.outcome import Result

__all__ = [
    "Members",
    "Point",
    "Setting",
    "first_carry",
    "gather",
    "make_programs",
    "order",
    "train_group",
]

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


def make_programs(
    problem: recipes.Problem,
    parts: int | None,
    *,
    convolves: bool,
    own_data: bool,
    own_order: bool,
) -> loop.Programs:
    """Make the functions of `loop.Programs` for a population: a scan of the vmapped step."""
    # Many models' convolutions are one in groups, which takes the CPU twice as long.
    each = population.in_turn if convolves and not problem.train.x.is_cuda else vmap
    # What all members share has no axis, so that it is read and looked up once.
    step = each(
        loop.step_of(problem, parts), (0, 0 if own_data else None, 0 if own_order else None)
    )
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
    keys = data_keys if setting.own_order else data_keys[:1]
    chunks = [
        loop.chunks(
            loop.epoch_order(setting.problem, setting.config, key, epoch), setting.plan.chunk
        )
        for key in keys
    ]
    if not setting.own_order:
        return chunks[0]
    return [
        Indices(*(torch.stack(leaves, 1) for leaves in zip(*parts, strict=True)))
        for parts in zip(*chunks, strict=True)
    ]


def first_carry(states: TrainState) -> loop.Carry:
    """Put with each state whether all its losses were finite."""
    return states, torch.ones(len(states.key), dtype=torch.bool, device=states.key.device)


def train_group(
    setting: Setting,
    config: Recipe,
    points: Sequence[Point],
    bar: tqdm,
    stopped: Callable[[], bool],
) -> tuple[TrainState, list[loop.Progress], list[Result]]:
    """Train the members of a group; give their states, how far they are, and their results."""
    members = gather(setting, points)
    carry, histories = first_carry(members.states), [list[dict[str, Any]]() for _ in points]
    steps = loop.steps_of(setting.problem, config)
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
