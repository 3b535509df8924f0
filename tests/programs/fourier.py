"""A spectral solver and layer: rfft, irfft, fft2, shifts, a filter of complex weights."""

from __future__ import annotations

import math

import torch
from torch import fft

from fdl import random
from tests.support.programs import Program

POINTS = 12
WAVES = fft.rfftfreq(POINTS, 1 / POINTS, dtype=torch.float64) * 2 * math.pi


def step(state, force):
    u, weights = state["u"], state["weights"]
    spectrum = fft.rfft(u)
    slope = fft.irfft(1j * WAVES * spectrum, n=POINTS)
    decayed = (spectrum + 0.01 * fft.rfft(force - u * slope)) * torch.exp(-0.001 * WAVES**2)
    new = fft.irfft(decayed * torch.view_as_complex(weights), n=POINTS)
    plane = fft.fftshift(fft.fft2(new[:, None] * force[None]))
    power = plane.abs().square().sum(0)
    convolved = fft.ifft(fft.fft(new) * fft.fft(force).conj()).real
    state = {"u": new, "weights": weights * 0.99 + 0.01}
    return state, {"power": power, "phase": decayed[1:4].angle(), "convolved": convolved}


def init():
    x = torch.arange(POINTS, dtype=torch.float64) * 2 * math.pi / POINTS
    weights = torch.stack([torch.ones(7), torch.linspace(0, 1, 7)], -1).double()
    return {"u": torch.sin(x) + 0.3 * torch.cos(2 * x + 0.4), "weights": weights}


def xs():
    return random.normal(random.key(0), (4, POINTS), torch.float64)


PROGRAM = Program(step, init, xs)
