"""Programs of training that are written to files, with their arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

import fdl
from fdl import data, losses, nn, optim, random, tree
from models import lenet, linreg


class Case(NamedTuple):
    fn: Callable[..., Any]  # (state, *rest) -> (state, ...)
    args: tuple[Any, ...]


def lenet_epoch() -> Case:
    model, opt = lenet(), optim.adam(1e-3)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    images = random.uniform(random.key(1), (32, 1, 28, 28))
    labels = random.randint(random.key(2), (32,), 0, 10)

    def epoch(state: Any, images: Tensor, labels: Tensor, rows: Tensor) -> Any:
        return fdl.scan(lambda state, i: step(state, (images[i], labels[i])), state, rows)

    return Case(epoch, (state, images, labels, torch.randperm(32).view(4, 8)))


def lenet_step() -> Case:
    model, opt = lenet(), optim.sgd(0.1, momentum=0.9)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    images = random.uniform(random.key(1), (8, 1, 28, 28))
    return Case(step, (state, (images, torch.arange(8))))


def linreg_epoch() -> Case:
    model, opt = linreg(), optim.sgd(0.03)
    step = fdl.train_step(fdl.supervised(model, losses.squared_loss), opt)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    examples = data.synthetic_linear(random.key(1), [2.0, -3.4], 4.2, 300, 0.1)

    def epoch(state: Any, examples: data.Dataset, key: Tensor) -> Any:
        rows = data.epoch_indices(random.fold_in(key, state.step), 300, 10)
        return fdl.scan(lambda state, i: step(state, data.batch(examples, i)), state, rows)

    return Case(epoch, (state, examples, random.key(2)))


def mlp_with_ema() -> Case:
    """Adam written by hand; the average *is* the parameters at first, and momentum and count 0."""
    model = nn.sequential(nn.linear(6, 16), nn.relu, nn.dropout(0.5), nn.linear(16, 3))
    params = model.init(random.key(0))
    zeros = tree.map(torch.zeros_like, params)
    state = {
        "params": params,
        "ema": params,
        "m": zeros,
        "v": zeros,
        "step": torch.tensor(0),
        "key": random.key(1),
    }

    def loss(params: Any, x: Tensor, y: Tensor, key: Tensor) -> Tensor:
        return losses.cross_entropy(model.apply(params, x, train=True, key=key), y).mean()

    def step(state: dict[str, Any], x: Tensor, y: Tensor) -> tuple[dict[str, Any], Tensor]:
        key, k_dropout = random.split(state["key"])
        grads, value = grad_and_value(loss)(state["params"], x, y, k_dropout)
        n = state["step"] + 1
        m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], grads)
        v = tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state["v"], grads)
        rate = 1e-2 * (1 - 0.99**n).sqrt() / (1 - 0.9**n)
        params = tree.map(lambda p, m, v: p - rate * m / (v.sqrt() + 1e-8), state["params"], m, v)
        ema = tree.map(lambda a, p: 0.9 * a + 0.1 * p, state["ema"], params)
        new = {"params": params, "ema": ema, "m": m, "v": v, "step": n, "key": key}
        return new, value

    return Case(step, (state, random.normal(random.key(2), (8, 6)), torch.arange(8) % 3))


CASES: dict[str, Callable[[], Case]] = {
    "lenet epoch": lenet_epoch,
    "lenet step": lenet_step,
    "linreg epoch": linreg_epoch,
    "mlp with ema": mlp_with_ema,
}
LOOPS = ("lenet epoch", "linreg epoch")
