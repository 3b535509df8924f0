"""Newton's method for many roots at once: a fixed number of steps, each root stops on its own."""

from __future__ import annotations

import torch
from torch.func import grad, vmap

import fdl
from tests.support.programs import Program


def newton(coefficients, guess):
    def f(x):
        return ((coefficients[0] * x + coefficients[1]) * x + coefficients[2]) * x - 1.0

    def improve(carry, _):
        x, done, used = carry
        new = x - f(x) / grad(f)(x)
        close = (new - x).abs() < 1e-8
        x = torch.where(done, x, new)
        return (x, done | close, used + (~done).int()), None

    first = (guess, torch.tensor(False), torch.tensor(0, dtype=torch.int32))
    (x, done, used), _ = fdl.scan(improve, first, length=15)
    return x, done, used


def step(guesses, coefficients):
    roots, done, used = vmap(newton, (None, 0))(coefficients, guesses)
    return 0.9 * roots + 0.1, {"used": used, "all": done.all(), "root": roots}


def init():
    return torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def xs():
    a = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    return torch.stack([a, a.flip(0), 2 * a], 1)


PROGRAM = Program(step, init, xs, rtol=1e-7)
