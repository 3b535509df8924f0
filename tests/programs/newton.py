"""Newton's method for softmax regression: torch.func.hessian, a damped solve, step halving."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import grad_and_value, hessian

from fdl import random
from tests.support.programs import Program

FEATURES, CLASSES = 3, 3


def loss_fn(w, x, y):
    logits = x @ w.view(FEATURES, CLASSES)
    return F.cross_entropy(logits, y) + 1e-2 * w.pow(2).sum()


def step(w, data):
    x, y = data
    gradient, loss = grad_and_value(loss_fn)(w, x, y)
    curvature = hessian(loss_fn)(w, x, y)
    direction = torch.linalg.solve(curvature, gradient)
    sizes = 0.5 ** torch.arange(5)
    candidates = w - sizes[:, None] * direction
    values = torch.vmap(loss_fn, in_dims=(0, None, None))(candidates, x, y)
    best = values.argmin(keepdim=True)
    decrement = (gradient * direction).sum()
    return candidates[best].squeeze(0), (loss, decrement, torch.linalg.eigvalsh(curvature))


def data():
    x = random.normal(random.key(0), (4, 20, FEATURES))
    return x, random.randint(random.key(1), (4, 20), 0, CLASSES)


PROGRAM = Program(
    step,
    init=lambda: torch.zeros(FEATURES * CLASSES),
    xs=data,
    rtol=1e-4,
    atol=1e-5,
)
