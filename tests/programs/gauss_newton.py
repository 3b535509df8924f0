"""Gauss-Newton: curvature products by jvp and vjp, conjugate gradients as a scan, LM damping."""

from __future__ import annotations

import torch
from torch.func import jvp, vjp

import fdl
from fdl import nn, random, tree
from tests.support.programs import Program

model = nn.sequential(nn.linear(3, 10), nn.tanh, nn.linear(10, 1))


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def add(a, scale, b):
    return tree.map(lambda x, y: x + scale * y, a, b)


def conjugate_gradients(matvec, b, iterations):
    def iterate(state, _):
        x, r, p, rr = state
        ap = matvec(p)
        alpha = rr / (dot(p, ap) + 1e-12)
        x, r = add(x, alpha, p), add(r, -alpha, ap)
        new = dot(r, r)
        return (x, r, add(r, new / (rr + 1e-12), p), new), new

    zero = tree.map(torch.zeros_like, b)
    (x, *_), norms = fdl.scan(iterate, (zero, b, b, dot(b, b)), length=iterations)
    return x, norms


def step(state, batch):
    params, damping = state
    x, y = batch

    def residuals(params):
        return (model.apply(params, x) - y).squeeze(-1) / len(x) ** 0.5

    r, pullback = vjp(residuals, params)
    (gradient,) = pullback(r)

    def product(v):
        return add(pullback(jvp(residuals, (params,), (v,))[1])[0], damping, v)

    direction, norms = conjugate_gradients(product, gradient, 6)
    candidate = add(params, -1.0, direction)
    better = residuals(candidate).square().sum() < r.square().sum()
    params = tree.map(lambda new, old: torch.where(better, new, old), candidate, params)
    damping = torch.where(better, damping / 2, damping * 4)
    return (params, damping), {"loss": r @ r, "norms": norms, "better": better}


def batches():
    x = random.normal(random.key(1), (4, 16, 3), torch.float64)
    return x, torch.sin(x.sum(-1, keepdim=True))


PULLBACK = "a loop that closes over a pullback is unrolled"
PROGRAM = Program(
    step,
    init=lambda: tree.cast((model.init(random.key(0)), torch.tensor(0.1)), torch.float64),
    xs=batches,
    fullgraph="Expected FakeTensor",
    faults={"grad": PULLBACK, "vmap": PULLBACK},
)
