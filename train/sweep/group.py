"""Train a group of a sweep's points at once, as one vmapped step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

import fdl
from fdl import TrainState, data, population, random, transforms, tree
from fdl._training._state import Metrics
from fdl.data import Dataset, Indices
from fdl.metrics import Mean
from train import loop, recipes
from train.config import Recipe
from train.planning import Plan, steps_per_epoch
from train.sweep.grid import Value
from train.sweep.results import Result

__all__ = [
    "Members",
    "Point",
    "Setting",
    "first_carry",
    "gather",
    "make_programs",
    "order",
    "scored_on",
    "train_group",
]

Point = dict[str, Value]


class Members(NamedTuple):
    """A group of points, ready to train: the first axis of every leaf is `[members]`."""

    states: TrainState
    data_keys: Tensor  # [members, 2]
    dataset: Dataset  # [members, …] if data are drawn for each seed
    scored: Dataset  # the data that choose, likewise


class Setting(NamedTuple):
    """Settings common to all groups."""

    name: str
    config: Recipe  # with the largest value of each axis
    problem: recipes.Problem
    own_order: bool  # each member has its own order of the data
    own_data: bool  # each member has its own data
    plan: Plan
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
    # Under vmap convolutions become grouped ones, which take a CPU twice as long.
    each = transforms.sequential_vmap if convolves and not problem.train.x.is_cuda else vmap
    # Data that all members share have no axis, and are read once.
    own = 0 if own_data else None
    step = each(loop.step_of(problem, parts), (0, own, 0 if own_order else None))
    evaluated = fdl.eval_step(problem.loss)
    score = each(
        lambda s, dataset, row: evaluated(s, data.to_float(data.batch(dataset, row))),
        (0, own, None),
    )

    def chunk(carry: loop.Carry, dataset: Dataset, rows: Indices) -> tuple[loop.Carry, Metrics]:
        carry, metrics = fdl.scan(lambda carry, row: step(carry, dataset, row), carry, rows)
        return carry, _total(metrics)

    def evaluate(states: TrainState, dataset: Dataset, rows: Indices) -> Metrics:
        return _total(fdl.scan(lambda _, row: ((), score(states, dataset, row)), (), rows)[1])

    return loop.Programs(fdl.jit(chunk, donate_argnums=0), fdl.jit(evaluate))


def _total(metrics: Metrics) -> Metrics:
    """Add up over the steps, the first axis; the axis of the members stays."""
    return {name: Mean(m.total.sum(0), m.count.sum(0)) for name, m in metrics.items()}


def gather(setting: Setting, points: Sequence[Point]) -> Members:
    """Draw the states of some points, and their data if these depend on the seed."""
    device = setting.problem.train.x.device
    seeds = [int(point.get("seed", setting.config.seed)) for point in points]
    keys = torch.stack([random.split(random.key(seed, device), 3) for seed in seeds])
    rates = {
        name: torch.tensor([float(point[name]) for point in points], dtype=torch.float64)
        for name in points[0]
        if name != "seed"
    }
    problem = setting.problem
    both = problem.train, scored_on(problem)[1]
    if setting.own_data:
        drawn = [recipes.build(setting.config, key) for key in keys[:, 2]]
        both = tree.stack([(each.train, scored_on(each)[1]) for each in drawn])
    states = population.create(problem.model, problem.opt, keys[:, 0], rates)
    return Members(states, keys[:, 1], *both)


def scored_on(problem: recipes.Problem) -> tuple[str, Dataset]:
    """Return the data by which a sweep chooses: validation, else test, else training set."""
    return [*loop.held_out(problem), ("train", problem.train)][0]


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
    """Return the carry that the first chunk starts from."""
    return states, torch.ones(len(states.key), dtype=torch.bool, device=states.key.device)


def train_group(
    setting: Setting,
    config: Recipe,
    points: Sequence[Point],
    bar: tqdm,
    stopped: Callable[[], bool],
) -> tuple[TrainState, list[loop.Progress], list[Result]]:
    """Train the members of a group; return their states, their progress and their results."""
    members = gather(setting, points)
    carry, histories = first_carry(members.states), [list[dict[str, Any]]() for _ in points]
    steps = steps_per_epoch(setting.problem, config)
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
        scores = score(setting, carry[0], members.scored)
        # An update that destroys the weights shows in the loss after it.
        carry = (carry[0], carry[1] & scores["loss"].value.isfinite())
        for i, history in enumerate(histories):
            row = population.member((carry[0].step, total, scores), i)
            history.append({"epoch": epoch, **_record(setting, row, seconds)})
        if stopped() or not carry[1].any():
            break
    # The progress of a run that diverged is never used.
    finished = loop.START._replace(epoch=epoch + 1)
    progress = [finished] * len(points)
    if done < steps:
        totals = [population.member(total, i) for i in range(len(points))]
        progress = [loop.Progress(epoch, done, member, seconds) for member in totals]
    results = [
        Result(point, ok, step, history)
        for point, ok, step, history in zip(
            points, carry[1].tolist(), carry[0].step.tolist(), histories, strict=True
        )
    ]
    return carry[0], progress, results


def score(setting: Setting, states: TrainState, dataset: Dataset) -> dict[str, Mean]:
    """Average the metrics of every member over the data by which a sweep chooses."""
    n, device = scored_on(setting.problem)[1].x.shape[0], states.key.device
    rows = data.sequential_indices(n, loop.EVAL_BATCH, device=device)
    return setting.programs.evaluate(states, dataset, rows)


def _record(
    setting: Setting, row: tuple[Tensor, dict[str, Mean], dict[str, Mean]], seconds: float
) -> dict[str, Any]:
    """Make a member's line of `metrics.jsonl`; its seconds are those of the whole group."""
    step, total, scores = row
    part = scored_on(setting.problem)[0]
    named = {f"{part}_{name}": mean for name, mean in scores.items() if part != "train"}
    return {
        "step": int(step),
        **{name: mean.value.item() for name, mean in (total | named).items()},
        "seconds": seconds,
        "examples_per_second": total["loss"].count.item() / seconds,
    }
