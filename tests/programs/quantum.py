"""A state of three qubits: unitary gates, a phase by angles, probabilities and expectations."""

from __future__ import annotations

import torch

from fdl import random
from tests.support.programs import Program

HADAMARD = torch.tensor([[1, 1], [1, -1]], dtype=torch.complex128) / 2**0.5
Z = torch.tensor([1.0, -1.0], dtype=torch.float64)


def apply(gate, psi, qubit):
    return torch.tensordot(gate, psi, ([1], [qubit])).movedim(0, qubit)


def rotation(angle):
    c, s = torch.cos(angle / 2), torch.sin(angle / 2)
    return torch.stack([torch.complex(c, -s), torch.complex(c, s)]).diag()


def step(psi, angles):
    for qubit in range(3):
        psi = apply(HADAMARD, psi, qubit)
        psi = apply(rotation(angles[qubit]), psi, qubit)
    psi = torch.where(torch.arange(2)[:, None, None] == 1, psi.flip(1), psi)  # controlled not
    phase = torch.polar(torch.ones_like(angles[0]), angles.sum())
    probability = (psi.conj() * psi).real
    expected = torch.einsum("abc,a,b->", probability, Z, Z)
    density = torch.einsum("abc,dbc->ad", psi, psi.conj())
    entropy = -torch.special.xlogy(probability, probability).sum()
    return psi * phase, {"expected": expected, "density": density, "entropy": entropy}


def init():
    psi = torch.zeros(2, 2, 2, dtype=torch.complex128)
    psi[0, 0, 0], psi[1, 0, 1] = 0.8, 0.6j
    return psi


def xs():
    return random.normal(random.key(0), (4, 3), torch.float64)


PROGRAM = Program(step, init, xs)
