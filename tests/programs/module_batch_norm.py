"""A residual nn.Module with batch norm, converted by from_module and trained with momentum."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fdl import interop, optim, random, tree
from tests.support.programs import Program


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 4, 3, stride=2)
        self.blocks = torch.nn.Sequential(Block(4), Block(4))
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class State(NamedTuple):
    params: dict
    buffers: dict
    opt: tuple


with torch.random.fork_rng():
    torch.manual_seed(0)
    model, params, buffers = interop.from_module(Net())
optimizer = optim.sgd(0.05, momentum=0.9)


def step(state, batch):
    def loss_fn(params):
        buffers = tree.map(torch.detach, state.buffers)
        logits, buffers = model.apply(params, buffers, batch["image"], train=True)
        return F.cross_entropy(logits, batch["label"]), (buffers, logits)

    grads, (loss, (buffers, logits)) = torch.func.grad_and_value(loss_fn, has_aux=True)(
        state.params
    )
    updates, opt = optimizer.update(grads, state.opt, state.params)
    params = optim.apply_updates(state.params, updates)
    correct = (logits.argmax(-1) == batch["label"]).sum()
    return State(params, buffers, opt), {"loss": loss, "correct": correct}


def batches():
    images = random.normal(random.key(0), (4, 8, 1, 10, 10))
    return {"image": images, "label": random.randint(random.key(1), (4, 8), 0, 3)}


PROGRAM = Program(
    step,
    init=lambda: State(params, buffers, optimizer.init(params)),
    xs=batches,
    rtol=1e-5,
    atol=1e-5,
)
