"""Discounted returns and advantages of several trajectories: vmap over a backward scan."""

from __future__ import annotations

import torch

import fdl
from fdl import random
from tests.support.programs import Program

GAMMA, LAMBDA = 0.9, 0.8


def advantages(values, rewards, done):
    def back(carry, now):
        advantage, following = carry
        value, reward, end = now
        alive = 1.0 - end.to(value.dtype)
        delta = reward + GAMMA * following * alive - value
        advantage = delta + GAMMA * LAMBDA * alive * advantage
        return (advantage, value), advantage

    zero = torch.zeros((), dtype=values.dtype)
    reversed_in_time = (values.flip(0), rewards.flip(0), done.flip(0))
    return fdl.scan(back, (zero, zero), reversed_in_time)[1].flip(0)


def step(values, batch):
    rewards, done = batch
    advantage = torch.vmap(advantages)(values, rewards, done)
    spread = torch.vmap(advantages, (None, 0, 0))(values[0], rewards, done).std(0)
    return values + 0.5 * advantage.detach() + 0.1 * advantage, (advantage.mean(1), spread)


def init():
    return random.normal(random.key(2), (3, 12), torch.float64)


def xs():
    rewards, done = random.split(random.key(3))
    return (
        random.normal(rewards, (4, 3, 12), torch.float64),
        random.uniform(done, (4, 3, 12)) < 0.2,
    )


PROGRAM = Program(step, init, xs)
