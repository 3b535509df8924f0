"""A Kalman filter with its log likelihood; missing observations are NaN and are skipped."""

from __future__ import annotations

import torch
from torch.distributions import MultivariateNormal

from fdl import random
from tests.support.programs import Program

DT = 0.1
TRANSITION = torch.eye(4) + DT * torch.diag(torch.ones(2), 2)
OBSERVATION = torch.eye(2, 4)
OBSERVATION_NOISE = 0.2 * torch.eye(2)


def step(state, observed):
    mean, covariance, log_q = state
    mean = TRANSITION @ mean
    covariance = TRANSITION @ covariance @ TRANSITION.T + log_q.exp() * torch.eye(4)

    missing = observed.isnan().any()
    predicted = OBSERVATION @ mean
    innovation = torch.where(missing, 0.0, observed - predicted)
    s = OBSERVATION @ covariance @ OBSERVATION.T + OBSERVATION_NOISE
    gain = torch.linalg.solve(s, OBSERVATION @ covariance).T
    updated = mean + gain @ innovation
    shrunk = (torch.eye(4) - gain @ OBSERVATION) @ covariance
    filled = torch.where(missing, predicted, observed)
    log_likelihood = MultivariateNormal(predicted, s, validate_args=False).log_prob(filled)

    mean = torch.where(missing, mean, updated)
    covariance = torch.where(missing, covariance, (shrunk + shrunk.T) / 2)
    return (mean, covariance, log_q), (mean, torch.where(missing, 0.0, log_likelihood))


def observations():
    path = random.normal(random.key(0), (8, 2)).cumsum(0)
    return path.index_fill(0, torch.tensor([3]), float("nan"))


PROGRAM = Program(
    step,
    init=lambda: (torch.zeros(4), torch.eye(4), torch.tensor(-2.0)),
    xs=observations,
)
