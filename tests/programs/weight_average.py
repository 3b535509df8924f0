"""An exponential moving average of parameters, bias-corrected, evaluated beside the live model."""

from __future__ import annotations

import torch

from fdl import losses, nn, optim, random, tree
from tests.support.programs import Program

DECAY = 0.9
model = nn.sequential(nn.linear(5, 16), nn.gelu, nn.layer_norm(16), nn.linear(16, 1))
optimizer = optim.adam(1e-2)


def loss_fn(params, x, y):
    return losses.mse(model.apply(params, x), y)


def step(state, batch):
    x, y = batch
    grads, loss = torch.func.grad_and_value(loss_fn)(state["params"], x, y)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    params = optim.apply_updates(state["params"], updates)
    ema = tree.map(lambda e, p: torch.lerp(p, e, DECAY), state["ema"], params)
    count = state["count"] + 1
    average = tree.map(lambda e: e / (1 - DECAY**count), ema)
    new = {"params": params, "opt": opt, "ema": ema, "count": count}
    return new, {"loss": loss, "averaged": loss_fn(average, x, y)}


def init():
    params = tree.cast(model.init(random.key(0)), torch.float64)
    zeros = tree.map(torch.zeros_like, params)
    count = torch.tensor(0)
    return {"params": params, "opt": optimizer.init(params), "ema": zeros, "count": count}


def batches():
    x = random.normal(random.key(1), (5, 16, 5), torch.float64)
    return x, x.prod(-1, keepdim=True)


PROGRAM = Program(step, init=init, xs=batches)
