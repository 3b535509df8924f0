"""An N-body system by leapfrog; the force is minus the gradient of the potential."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fdl import random
from tests.support.programs import Program

BODIES, SOFTENING = 5, 0.1


class Phase(NamedTuple):
    position: torch.Tensor
    momentum: torch.Tensor
    mass: torch.Tensor


def potential(position, mass):
    offset = position[:, None] - position[None]
    distance = (offset.pow(2).sum(-1) + SOFTENING).sqrt()
    pairs = torch.triu(torch.outer(mass, mass) / distance, diagonal=1)
    return -pairs.sum()


def step(phase, dt):
    force = torch.func.grad(potential)
    momentum = phase.momentum - dt / 2 * force(phase.position, phase.mass)
    position = phase.position + dt * momentum / phase.mass[:, None]
    momentum = momentum - dt / 2 * force(position, phase.mass)
    kinetic = (momentum**2 / phase.mass[:, None]).sum() / 2
    energy = kinetic + potential(position, phase.mass)
    angular = torch.linalg.cross(position, momentum).sum(0)
    return Phase(position, momentum, phase.mass), {"energy": energy, "angular": angular}


def init():
    position, momentum = random.normal(random.key(0), (2, BODIES, 3))
    return Phase(position, momentum, torch.linspace(1, 2, BODIES))


PROGRAM = Program(step, init=init, xs=lambda: torch.full((8,), 0.01))
