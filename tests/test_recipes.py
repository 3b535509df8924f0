"""Every recipe of `train`: the ways to run it agree, it compiles once, and all of it is on the GPU."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import StandIn
from laws import Graphs, unchanged
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fdl import TrainState, _trace, data, jit, optim, random, scan, train_step, tree
from train import config, recipes

RECIPES = {
    "linreg": config.Linreg(),
    "linreg-decay": config.LinregDecay(),
    "weight-decay": config.WeightDecay(),
    "softmax": config.Softmax(data="sample", batch_size=16),
    "mlp": config.Mlp(data="sample", batch_size=16),
    "dropout": config.Dropout(data="sample", batch_size=16),
    "lenet": config.LeNet(data="sample", batch_size=8),
}
STEPS = 100
Epoch = Callable[[TrainState, Any, data.Indices], Any]


class Run(NamedTuple):
    """What a recipe starts from."""

    epoch: Epoch
    state: TrainState
    dataset: data.Dataset
    indices: data.Indices


def prepare(name: str, dtype: torch.dtype) -> Run:
    """Set up 100 steps of a recipe, with momentum and a schedule that halves the rate twice."""
    chosen = RECIPES[name]
    problem = recipes.build(chosen, random.key(1))
    rate = optim.schedules.step(chosen.lr, step_size=40, gamma=0.5)
    opt = optim.sgd(rate, momentum=0.5, weight_decay=chosen.weight_decay)
    state = TrainState.create(problem.model, opt, key=random.key(0))
    params = tree.cast(state.params, dtype)
    state = state._replace(params=params, opt_state=opt.init(params))
    x, y = problem.train
    if x.dtype == torch.uint8:
        x, y = x[:1000, None] / 255, y[:1000]
    dataset = tree.cast(data.Dataset(x, y), dtype)
    epochs = math.ceil(STEPS / math.ceil(len(x) / chosen.batch_size))
    parts = [
        data.epoch_indices(random.fold_in(random.key(2), e), len(x), chosen.batch_size)
        for e in range(epochs)
    ]
    indices = tree.map(lambda *rows: torch.cat(rows)[:STEPS], *parts)
    step = train_step(problem.loss, opt)

    def epoch(state: TrainState, dataset: data.Dataset, indices: data.Indices) -> Any:
        return scan(lambda s, row: step(s, data.gather(dataset, row)), state, indices)

    return Run(epoch, state, dataset, indices)


def by_steps(run: Run) -> Any:
    """The epoch as a Python loop over a jitted epoch of one step."""
    jitted, state, found = jit(run.epoch), run.state, []
    for i in range(STEPS):
        row = tree.map(lambda leaf, i=i: leaf[i : i + 1], run.indices)
        state, metrics = jitted(state, run.dataset, row)
        found.append(metrics)
    return state, tree.map(lambda *rows: torch.cat(rows), *found)


def agree(got: Any, expected: Any, rtol: float, atol: float) -> None:
    assert tree.diff(expected, got, rtol=rtol, atol=atol) == []


def runs_of(dtype: torch.dtype) -> dict[str, Run]:
    return {name: prepare(name, dtype) for name in RECIPES}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    """All recipes as one function, which takes far less time to compile than each alone."""
    runs = runs_of(dtype)
    arguments = {name: run[1:] for name, run in runs.items()}

    def everything(arguments: Any) -> Any:
        return {name: runs[name].epoch(*arguments[name]) for name in runs}

    jitted = jit(everything, strict=True)
    with unchanged(arguments):
        got = jitted(arguments)
    for name, run in runs.items():
        state, metrics = run.epoch(*run[1:])
        moved = tree.map(lambda a, b: (a - b).abs().max(), state.params, run.state.params)
        assert all(leaf > 1e-4 for leaf in tree.leaves(moved)), name
        print(
            name,
            torch.finfo(dtype).bits,
            max(
                (a - b).abs().max().item()
                for a, b in zip(tree.leaves(got[name][0].params), tree.leaves(state.params))
            ),
            (got[name][1]["loss"].value - metrics["loss"].value).abs().max().item(),
            metrics["loss"].value.abs().max().item(),
        )
        if dtype == torch.float64:
            agree(got[name], (state, metrics), rtol=1e-10, atol=1e-10)
        else:
            agree(got[name][1]["loss"].value, metrics["loss"].value, rtol=1e-5, atol=1e-5)
