"""MAML with a learned inner rate: three inner steps on sine waves, tasks under vmap."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

TASKS, SHOTS = 3, 5


def net(params, x):
    hidden = torch.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"]


def loss_fn(params, x, y):
    return ((net(params, x) - y) ** 2).mean()


def adapt(meta, x, y):
    params = meta["params"]
    for _ in range(3):
        grads = torch.func.grad(loss_fn)(params, x, y)
        params = {k: params[k] - meta["log_lr"].exp() * grads[k] for k in params}
    return params


def sample(key):
    wave, points = random.split(key)
    amplitude, phase = random.uniform(wave, (2,), minval=0.5, maxval=3.0)
    x = random.uniform(points, (2, SHOTS, 1), minval=-3.0, maxval=3.0)
    return x, amplitude * torch.sin(x + phase)


def step(meta, key):
    def task_loss(meta, key):
        x, y = sample(key)
        return loss_fn(adapt(meta, x[0], y[0]), x[1], y[1])

    def meta_loss(meta):
        return torch.vmap(task_loss, in_dims=(None, 0))(meta, random.split(key, TASKS)).mean()

    grads, loss = torch.func.grad_and_value(meta_loss)(meta)
    params = {k: p - 0.01 * grads["params"][k] for k, p in meta["params"].items()}
    return {"params": params, "log_lr": meta["log_lr"] - 0.01 * grads["log_lr"]}, loss


def init():
    w1, w2 = random.split(random.key(0))
    params = {
        "w1": random.normal(w1, (1, 20)),
        "b1": torch.zeros(20),
        "w2": random.normal(w2, (20, 1)) / 20**0.5,
    }
    return {"params": params, "log_lr": torch.tensor(-3.0)}


PROGRAM = Program(step, init=init, xs=lambda: random.split(random.key(1), 4))
