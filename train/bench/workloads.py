"""The workloads: recipes of the course, and the arrays for their runners."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fdl import TrainState, data, random, tree
from fdl.data import Dataset
from train import recipes
from train.bench.config import Bench
from train.bench.task import Task
from train.config import (
    Cnn,
    Dropout,
    Images,
    LeNet,
    LeNetBN,
    Linreg,
    Mlp,
    Recipe,
    Softmax,
)

__all__ = ["Workload", "find", "make_task"]

# At the recipe's lr of 0.5 the MLP is chaotic: float32 and float64 diverge after 60 steps. At 0.1
# they agree to 1e-6 for hundreds of steps, so a difference means a fault. A step takes as long. In
# the last two, rounding decides which of two nearly equal pixels is the maximum of a window; the
# differences stay small at 0.001.
RECIPES: dict[str, tuple[str, Recipe]] = {
    "linreg": ("linreg", Linreg()),
    "softmax": ("softmax", Softmax()),
    "mlp": ("mlp", Mlp(lr=0.1)),
    "dropout": ("dropout", Dropout()),
    "lenet": ("lenet", LeNet()),
    "lenet-momentum": ("lenet", LeNet(lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "lenet-adam": ("lenet", LeNet(lr=1e-3, batch_size=16)),
    "lenet-bn": ("lenet-bn", LeNetBN(lr=1e-3)),
    "cnn": ("cnn", Cnn(lr=1e-3)),
}
ADAM = ("lenet-adam",)  # workloads that Adam trains; the others are trained by SGD
MOST_SCALED = 100 * 256  # examples in a call with scaled batches


class Workload(NamedTuple):
    """A recipe and its name in the table."""

    name: str
    model: str
    recipe: Recipe
    scaled: bool  # one of the batch sizes of lenet-scaling


def find(config: Bench) -> list[Workload]:
    """List the workloads that the options name."""
    workloads = []
    for name in dict.fromkeys(config.workloads):
        if name == "lenet-scaling":
            workloads += [
                Workload(f"lenet-{size}", "lenet", LeNet(batch_size=size), True)
                for size in config.batch_sizes
            ]
        else:
            workloads.append(Workload(name, *RECIPES[name], False))
    return workloads


def make_task(workload: Workload, config: Bench, images: Dataset | None, device: str) -> Task:
    """Draw the input of all runners: initial weights, the order of the examples, a key.

    Args:
        workload: the workload.
        config: gives seed and steps.
        images: the training set of workloads on images.
        device: device of the training; everything is drawn on the CPU.

    Raises:
        ValueError: a batch is larger than the data set.
    """
    recipe = replace(workload.recipe, seed=config.seed)
    state_key, data_key, problem_key = random.split(random.key(config.seed), 3)
    if isinstance(recipe, Images):
        assert images is not None
        problem = recipes.image_problem(recipe, images, None, "")
    else:
        problem = recipes.build(recipe, problem_key)
    state = TrainState.create(problem.model, problem.opt, key=state_key)
    n = len(problem.train.x)
    if recipe.batch_size > n:
        raise ValueError(
            f"--batch-sizes must be at most {n}, the number of examples, got {recipe.batch_size}"
        )
    order = data.epoch_indices(data_key, n, recipe.batch_size, drop_last=True)
    steps = min(config.steps, len(order.index))
    if workload.scaled:
        steps = min(steps, max(2, MOST_SCALED // recipe.batch_size))
    return Task(
        model=workload.model,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        adam=workload.name in ADAM,
        rates=recipe.rates if isinstance(recipe, Dropout) else (),
        steps=steps,
        device=device,
        x=problem.train.x.numpy(),
        y=problem.train.y.numpy(),
        batches=order.index.numpy(),
        key=state.key.numpy().astype(np.uint32),
        params={path: leaf.numpy() for path, leaf in tree.flatten_dict(state.params).items()},
        buffers={path: leaf.numpy() for path, leaf in tree.flatten_dict(state.buffers).items()},
    )
