"""Rows for fdl.transforms in the table of tests/laws/test_public_functions.py."""

from typing import Any

import torch
from torch import Tensor

from fdl import losses, nn, random, transforms, tree
from fdl.tree import Tree
from tests.laws.rows import Case, draw, weights

net = nn.sequential(fc=nn.linear(3, 2), act=nn.tanh)
y = torch.tensor([0, 1, 1])


def loss(params: Tree, batch: tuple[Tensor, ...], **_: Any) -> Tensor:
    return losses.cross_entropy(net.apply(params, batch[0]), batch[1])


def examples(key: Tensor) -> tuple[Tree, Tensor]:
    one, two = random.split(key)
    return weights(one), draw(two, 3, 3)


def directions(key: Tensor) -> tuple[Tree, Tree]:
    one, two = random.split(key)
    return weights(one), weights(two)


def f(params: Tree) -> Tensor:
    return loss(params, (torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3), y))


TRANSFORMATIONS = {
    "checkpoint": Case(transforms.checkpoint(net.apply), examples, grads=(0, 1)),
    "clipped_grad_sum": Case(
        lambda p, x: transforms.clipped_grad_sum(loss, 0.3, 2)(p, (x, y)), examples, grads=(0, 1)
    ),
    "gnvp": Case(
        lambda p, v: transforms.gnvp(
            lambda p: net.apply(p, torch.eye(3, dtype=torch.float64)),
            lambda z: losses.cross_entropy(z, y),
            p,
            v,
        ),
        directions,
        grads=(0, 1),
    ),
    "hessian": Case(lambda p: transforms.hessian(f, 5)(p), lambda key: (weights(key),), grads=()),
    "hutchinson_trace": Case(
        lambda p, key: transforms.hutchinson_trace(
            lambda v: transforms.hvp(f, p, v), p, key, samples=3
        ),
        lambda key: (weights(key), key),
        grads=(),  # third derivatives are long to trace: tests/transforms/test_curvature.py
    ),
    "hvp": Case(lambda p, v: transforms.hvp(f, p, v), directions, grads=(0, 1)),
    "per_sample_grads": Case(
        lambda p, x: transforms.per_sample_grads(loss)(p, (x, y)), examples, grads=(0, 1)
    ),
    "per_sample_norms": Case(
        lambda p, x: transforms.per_sample_norms(loss, 2)(p, (x, y)), examples, grads=(0, 1)
    ),
    "sequential_vmap": Case(
        lambda p, x: transforms.sequential_vmap(net.apply, (None, 0))(p, x),
        examples,
        grads=(0, 1),
    ),
    "stop_gradient": Case(
        lambda p: tree.map(torch.mul, p, transforms.stop_gradient(p)), lambda key: (weights(key),)
    ),
}
