"""A group of a sweep's points, trained at once: members share every instruction."""

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
    """A group of points, ready to train: every leaf has the first axis [members]."""

    states: TrainState
    data_keys: Tensor  # [members, 2]
    dataset: Dataset  # [members, …] where data are drawn, for each seed its own
    scored: Dataset  # by what they are chosen, likewise


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
    each = transforms.sequential_vmap if convolves and not problem.train.x.is_cuda else vmap
    # What all members share has no axis, so that it is read and looked up once.
    own = 0 if own_data else None
    step = each(loop.step_of(problem, parts), (0, own, 0 if own_order else None))
    evaluated = fdl.eval_step(problem.loss)
    score = each(lambda s, dataset, row: evaluated(s, data.gather(dataset, row)), (0, own, None))

    def chunk(carry: loop.Carry, dataset: Dataset, rows: Indices) -> tuple[loop.Carry, Metrics]:
        carry, metrics = fdl.scan(lambda carry, row: step(carry, dataset, row), carry, rows)
        return carry, _total(metrics)

    def evaluate(states: TrainState, dataset: Dataset, rows: Indices) -> Metrics:
        return _total(fdl.scan(lambda _, row: ((), score(states, dataset, row)), (), rows)[1])

    return loop.Programs(fdl.jit(chunk, donate_argnums=0), fdl.jit(evaluate))


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
    problem = setting.problem
    both = problem.train, scored_on(problem)[1]
    if setting.own_data:
        drawn = [recipes.build(setting.config, key) for key in keys[:, 2]]
        both = tree.stack([(each.train, scored_on(each)[1]) for each in drawn])
    states = population.create(problem.model, problem.opt, keys[:, 0], rates)
    return Members(states, keys[:, 1], *both)


def scored_on(problem: recipes.Problem) -> tuple[str, Dataset]:
    """Return by what a sweep chooses: validation set, else test set, else training set."""
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
        scores = score(setting, carry[0], members.scored)
        # An update that destroys the weights shows in the loss after it.
        carry = (carry[0], carry[1] & scores["loss"].value.isfinite())
        for i, history in enumerate(histories):
            row = population.member((carry[0].step, total, scores), i)
            history.append({"epoch": epoch, **_record(setting, row, seconds)})
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


def score(setting: Setting, states: TrainState, dataset: Dataset) -> dict[str, Mean]:
    """Average the metrics of every member over what they are chosen by."""
    n, device = scored_on(setting.problem)[1].x.shape[0], states.key.device
    rows = data.sequential_indices(n, loop.EVAL_BATCH, device=device)
    return setting.programs.evaluate(states, dataset, rows)


def _record(
    setting: Setting, row: tuple[Tensor, dict[str, Mean], dict[str, Mean]], seconds: float
) -> dict[str, Any]:
    """Make a member's line of `metrics.jsonl`, its seconds those of the whole group."""
    step, total, scores = row
    part = scored_on(setting.problem)[0]
    named = {f"{part}_{name}": mean for name, mean in scores.items() if part != "train"}
    return {
        "step": int(step),
        **{name: mean.value.item() for name, mean in (total | named).items()},
        "seconds": seconds,
        "examples_per_second": total["loss"].count.item() / seconds,
    }
