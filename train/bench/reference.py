"""The reference for every runner: the imperative loop in float64, in a process of its own.

`python -m train.bench.reference TASK OUT` writes losses and final parameters, and counts the
floating-point operations of a step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fdl import random
from models import torch_modules
from train.bench.check import Reference
from train.bench.runner import CALLS
from train.bench.task import Task, load, save_arrays
from train.bench.torch_peers import Eager, floats, make_optimizer

__all__ = ["GivenDropout", "count_flops", "draw_masks", "run", "write"]

SEEDS = 16  # of torch's dropout, to measure the standard deviation of the mean loss


class GivenDropout(nn.Module):
    """Dropout with a given mask, so that both sides drop the same units."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.keep: Tensor | None = None  # bool, of the shape of x; None drops nothing

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mask."""
        return x if self.keep is None else torch.where(self.keep, x / (1 - self.rate), 0.0)


def draw_masks(module: nn.Sequential, key: Tensor, x: Tensor) -> None:
    """Give each dropout the mask that the functional model draws from `key`: child i folds in i."""
    with torch.no_grad():
        for i, child in enumerate(module):
            if isinstance(child, GivenDropout):
                child.keep = random.uniform(random.fold_in(key, i), x.shape) >= child.rate
            x = child(x)


def run(task: Task) -> Reference:
    """Train `CALLS` calls from the initial weights, in float64 on the CPU."""
    module = torch_modules.make(task.model, task.rates, GivenDropout).double()
    start = task.params | task.buffers
    module.load_state_dict({name: torch.from_numpy(p) for name, p in start.items()})
    optimizer = make_optimizer(task, module)
    loss_fn, key = torch_modules.loss_of(task.model), torch.from_numpy(task.key.astype(np.int64))
    losses = []
    for i, row in enumerate(np.concatenate([task.rows] * CALLS)):
        batch = task._replace(x=task.x[row], y=task.y[row])
        x, y = floats(batch).double(), torch.from_numpy(batch.y)
        y = y.double() if y.is_floating_point() else y
        if isinstance(module, nn.Sequential):
            draw_masks(module, random.fold_in(key, i), x)
        optimizer.zero_grad()
        loss = loss_fn(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    params = {name: p.numpy().copy() for name, p in module.state_dict().items()}
    return Reference(np.array(losses), start, params, other_masks(task))


def other_masks(task: Task) -> tuple[float, float] | None:
    """Return mean and standard deviation of the mean loss over seeds of torch's own dropout."""
    if not task.rates:
        return None
    runner, means = Eager(task._replace(device="cpu")), []
    for seed in range(1, SEEDS + 1):
        runner.reset()
        torch.manual_seed(seed)  # `reset` has set seed 0, that of the runners
        means.append(np.mean([runner.losses(runner.epoch()) for _ in range(CALLS)]))
    return float(np.mean(means)), float(np.std(means, ddof=1))


def count_flops(task: Task) -> int:
    """Count the floating-point operations of the products and convolutions of one step."""
    runner = Eager(task._replace(device="cpu"))
    with FlopCounterMode(display=False) as counter:
        runner.step(0)
    return int(counter.get_total_flops())


def write(task: Task, out: Path) -> None:
    """Write the reference to one .npz file."""
    reference = run(task)
    arrays: dict[str, Any] = {f"params/{name}": p for name, p in reference.params.items()}
    if reference.other_masks is not None:
        arrays["other_masks"] = np.array(reference.other_masks)
    save_arrays(out, losses=reference.losses, flops=np.array(count_flops(task)), **arrays)


if __name__ == "__main__":
    write(load(Path(sys.argv[1])), Path(sys.argv[2]))
