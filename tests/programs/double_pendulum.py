"""A double pendulum by Runge-Kutta, its lengths and masses fitted through the integrator."""

from __future__ import annotations

import math

import torch
from torch import cos, sin

from fdl import random
from tests.support.programs import Program

G, DT = 9.81, 0.02


def derivative(q, params):
    angle1, angle2, rate1, rate2 = q.unbind(-1)
    l1, l2, m1, m2 = params.exp()
    delta = angle1 - angle2
    denominator = 2 * m1 + m2 - m2 * cos(2 * delta)
    acceleration1 = (
        -G * (2 * m1 + m2) * sin(angle1)
        - m2 * G * sin(angle1 - 2 * angle2)
        - 2 * sin(delta) * m2 * (rate2**2 * l2 + rate1**2 * l1 * cos(delta))
    ) / (l1 * denominator)
    acceleration2 = (
        2
        * sin(delta)
        * (
            rate1**2 * l1 * (m1 + m2)
            + G * (m1 + m2) * cos(angle1)
            + rate2**2 * l2 * m2 * cos(delta)
        )
    ) / (l2 * denominator)
    return torch.stack([rate1, rate2, acceleration1, acceleration2], -1)


def rk4(q, params):
    k1 = derivative(q, params)
    k2 = derivative(q + DT / 2 * k1, params)
    k3 = derivative(q + DT / 2 * k2, params)
    k4 = derivative(q + DT * k3, params)
    return q + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def step(state, push):
    q, params = state["q"], state["params"]
    for _ in range(3):
        q = rk4(q, params)
    q = q + torch.nn.functional.pad(push, (2, 0))
    return {"q": q, "params": params}, {"tip": sin(q[:, :2]).sum(-1), "rate": q[:, 2:].norm()}


PROGRAM = Program(
    step,
    init=lambda: {
        "q": random.normal(random.key(0), (5, 4)),
        "params": torch.full((4,), math.log(1.2)),
    },
    xs=lambda: 0.1 * random.normal(random.key(1), (6, 5, 2)),
)
