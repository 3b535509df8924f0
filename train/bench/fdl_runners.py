"""The runners of fdl: the epoch as one program, as `train` runs it, step by step, and eager."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fdl import TrainState, data, jit, losses, optim, random, scan, supervised, train_step, tree
from fdl._training._state import Metrics
from fdl.data import Dataset, Indices
from fdl.metrics import Mean
from train import config, loop, recipes
from train.bench.runner import Loop
from train.bench.task import Array, Task
from train.bench.torch_peers import TorchRunner

__all__ = ["Chunk", "Eager", "Scan", "Step"]

RECIPES: dict[str, type[config.Recipe]] = {
    "linreg": config.Linreg,
    "softmax": config.Softmax,
    "mlp": config.Mlp,
    "dropout": config.Dropout,
    "lenet": config.LeNet,
    "lenet-bn": config.LeNetBN,
    "cnn": config.Cnn,
}


def problem_of(task: Task, device: torch.device) -> recipes.Problem:
    """Make the problem that `train` makes of the recipe, on the task's own examples."""
    options: dict[str, Any] = {"rates": task.rates} if task.model == "dropout" else {}
    recipe = RECIPES[task.model](
        lr=task.lr,
        momentum=task.momentum,
        weight_decay=task.weight_decay,
        batch_size=task.batches.shape[1],
        **options,
    )
    x, y = (torch.from_numpy(array).to(device) for array in (task.x, task.y))
    examples = Dataset(x, y)
    if isinstance(recipe, config.Images):
        problem = recipes.image_problem(recipe, examples, None, "of the benchmark")
    else:
        problem = recipes.build(recipe, random.key(0))._replace(train=examples)
    return problem._replace(opt=optim.adam(task.lr)) if task.adam else problem


class FdlRunner(TorchRunner):
    """Base of the runners of fdl, with the examples on the device and the state."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.problem = problem_of(task, self.device)
        index = torch.from_numpy(task.rows).to(self.device)
        self.order = Indices(index, torch.ones_like(index, dtype=torch.bool))
        self.reset()

    def reset(self) -> None:
        """Make the state of step 0 from copies, because it is donated."""
        state = TrainState.create(
            self.problem.model,
            self.problem.opt,
            key=random.key(0, self.device),
            params=self.copies(self.task.params),
        )
        key = torch.from_numpy(self.task.key.astype(np.int64)).to(self.device)
        self.state = state._replace(key=key, buffers=self.copies(self.task.buffers))

    def copies(self, arrays: dict[str, Array]) -> Any:
        """Copy arrays to the device, as a tree."""
        flat = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        return tree.unflatten_dict(flat)

    def params(self) -> dict[str, Array]:
        """Copy the parameters and buffers, by path."""
        flat = tree.flatten_dict(self.state.params) | tree.flatten_dict(self.state.buffers)
        return {name: p.cpu().numpy().copy() for name, p in flat.items()}


def step_of(problem: recipes.Problem, task: Task) -> Any:
    """Make the step `(state, dataset, row) -> (state, metrics)`, with the loss as only metric."""
    loss_fn = losses.squared_loss if task.model == "linreg" else losses.cross_entropy
    step = train_step(supervised(problem.model, loss_fn), problem.opt)

    def gather_and_step(
        state: TrainState, dataset: Dataset, row: Indices
    ) -> tuple[TrainState, Metrics]:
        return step(state, data.to_float(data.batch(dataset, row)))

    return gather_and_step


class Scan(FdlRunner):
    """`fdl.jit` of the scanned epoch, one program as in the README."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        step = step_of(self.problem, task)

        def epoch(
            state: TrainState, dataset: Dataset, order: Indices
        ) -> tuple[TrainState, Metrics]:
            return scan(lambda state, row: step(state, dataset, row), state, order)

        self.program = jit(epoch, donate_argnums=0)

    def epoch(self) -> Mean:
        """Call the program."""
        self.state, metrics = self.program(self.state, self.problem.train, self.order)
        return metrics["loss"]

    def losses(self, losses: Mean) -> list[float]:
        """Copy all losses at once."""
        values: list[float] = losses.value.tolist()
        return values


class Chunk(FdlRunner):
    """The chunk of `train`, one epoch long, with accuracy and guard against NaN."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.program = loop.run_chunk(self.problem)

    def epoch(self) -> Mean:
        """Call the program."""
        carry = (self.state, torch.ones((), dtype=torch.bool, device=self.device))
        (self.state, _), metrics = self.program(carry, self.problem.train, self.order)
        return metrics["loss"]

    def losses(self, losses: Mean) -> list[float]:
        """Return the mean loss of the call."""
        return [losses.value.item()]


class Step(FdlRunner, Loop):
    """`fdl.jit` of one step, in a Python loop."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.rows = [Indices(*row) for row in zip(*self.order, strict=True)]
        self.program = self.make_program()

    def make_program(self) -> Any:
        """Compile the step."""
        return jit(step_of(self.problem, self.task), donate_argnums=0)

    def step(self, i: int) -> Mean:
        """Call the program."""
        self.state, metrics = self.program(self.state, self.problem.train, self.rows[i])
        return metrics["loss"]

    def losses(self, losses: list[Mean]) -> list[float]:
        """Compute the means after the loop."""
        return [loss.value.item() for loss in losses]


class Eager(Step):
    """The step without compiling."""

    def make_program(self) -> Any:
        """Return the step as it is."""
        return step_of(self.problem, self.task)
