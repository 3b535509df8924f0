"""Hypergradient: the gradient of a validation loss through a scan of training steps."""

from __future__ import annotations

import torch

import fdl
from fdl import random
from tests.support.programs import Program

FEATURES = 6


def train_loss(w, x, y, log_penalty):
    return ((x @ w - y) ** 2).mean() + (log_penalty.exp() * w**2).sum()


def step(hyper, data):
    x, y, x_val, y_val = data

    def validation_loss(hyper):
        def inner(w, batch):
            grad, loss = torch.func.grad_and_value(train_loss)(w, *batch, hyper["log_penalty"])
            return w - hyper["log_lr"].exp() * grad, loss

        w, losses = fdl.scan(inner, torch.zeros(FEATURES), (x, y))
        return ((x_val @ w - y_val) ** 2).mean(), losses

    grads, (loss, losses) = torch.func.grad_and_value(validation_loss, has_aux=True)(hyper)
    hyper = {name: value - 0.1 * grads[name] for name, value in hyper.items()}
    return hyper, {"validation": loss, "train": losses}


def init():
    return {"log_lr": torch.tensor(-2.0), "log_penalty": torch.full((FEATURES,), -3.0)}


def data():
    x, x_val = random.normal(random.key(0), (2, 4, 7, 8, FEATURES)).unbind()
    w = torch.arange(float(FEATURES))
    noise = random.normal(random.key(1), (4, 7, 8))
    return x, x @ w + noise, x_val[:, 0], x_val[:, 0] @ w


PROGRAM = Program(step, init=init, xs=data)
