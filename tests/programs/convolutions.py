"""Convolutions of a signal and of an image: dilated, grouped, depthwise, strided, transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random, tree
from tests.support.programs import Program

SHAPES = {
    "causal": (4, 4, 3),
    "grouped": (4, 2, 3),
    "up": (4, 2, 4),
    "depthwise": (3, 1, 3, 3),
    "pointwise": (6, 3, 1, 1),
    "transposed": (6, 1, 2, 2),
}


def forward(params, signal, image):
    x = F.conv1d(F.pad(signal, (4, 0)), params["causal"], dilation=2)
    x = F.gelu(F.conv1d(x, params["grouped"], padding="same", groups=2))
    x = F.conv_transpose1d(x, params["up"], stride=2, padding=1)
    y = F.conv2d(image, params["depthwise"], padding=1, groups=3)
    y = F.max_pool2d(F.silu(F.conv2d(y, params["pointwise"], stride=2)), 2, 1)
    y = F.conv_transpose2d(y, params["transposed"], stride=2, groups=6, output_padding=1)
    return x, y


def loss(params, signal, image):
    x, y = forward(params, signal, image)
    return x.square().mean() + (y - 0.1).square().mean()


def step(params, batch):
    grads, value = torch.func.grad_and_value(loss)(params, *batch)
    return tree.map(lambda p, g: p - 0.5 * g, params, grads), (value, *forward(params, *batch))


def init():
    keys = random.split(random.key(0), len(SHAPES))
    pairs = zip(keys, SHAPES.items(), strict=True)
    return {name: random.normal(key, s, torch.float64) / 2 for key, (name, s) in pairs}


def xs():
    signal, image = random.split(random.key(1))
    return (
        random.normal(signal, (4, 2, 4, 8), torch.float64),
        random.normal(image, (4, 1, 3, 8, 7), torch.float64),
    )


PROGRAM = Program(step, init, xs)
