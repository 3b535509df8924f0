"""A Kalman filter in Joseph's form: linalg.solve, Cholesky factors, log-determinants."""

from __future__ import annotations

import math

import torch
from torch import linalg

from fdl import random
from tests.support.programs import Program

MOTION = torch.tensor([[1.0, 0.1, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 0.8]], dtype=torch.float64)
SENSOR = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def step(state, measured):
    mean, cov = MOTION @ state["mean"], MOTION @ state["cov"] @ MOTION.T + 0.1 * EYE
    noise = 0.2 * torch.eye(2, dtype=torch.float64)
    innovation = SENSOR @ cov @ SENSOR.T + noise
    gain = linalg.solve(innovation, SENSOR @ cov).T
    residual = measured - SENSOR @ mean
    factor = linalg.cholesky(innovation)
    white = linalg.solve_triangular(factor, residual[:, None], upper=False)[:, 0]
    log_det = 2 * factor.diagonal().log().sum()
    keep = EYE - gain @ SENSOR
    cov = keep @ cov @ keep.T + gain @ noise @ gain.T
    log_likelihood = -0.5 * (white @ white + log_det + 2 * math.log(2 * math.pi))
    also = linalg.slogdet(innovation).logabsdet - log_det + torch.logdet(cov)
    return {"mean": mean + gain @ residual, "cov": cov}, (log_likelihood, also, linalg.inv(cov))


def init():
    return {"mean": torch.zeros(3, dtype=torch.float64), "cov": 2.0 * EYE}


def xs():
    return random.normal(random.key(0), (6, 2), torch.float64)


PROGRAM = Program(step, init, xs)
