"""REINFORCE on a cart-pole written in torch: rollout by scan, discounted returns, baseline."""

from __future__ import annotations

import torch
from torch.distributions import Categorical

import fdl
from fdl import nn, random, tree
from tests.support.programs import FORMS, Program

ENVIRONMENTS, STEPS, GAMMA = 4, 10, 0.95
policy = nn.sequential(nn.linear(4, 16), nn.tanh, nn.linear(16, 2))


def physics(s, action):
    _, v, angle, rate = s.unbind(-1)
    force = torch.where(action == 1, 10.0, -10.0)
    sin, cos = angle.sin(), angle.cos()
    push = (force + 0.05 * rate**2 * sin) / 1.1
    angular = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    acceleration = push - 0.05 * angular * cos / 1.1
    change = torch.stack([v, acceleration, rate, angular], -1)
    return s + 0.02 * change


def rollout(params, key):
    start, acts = random.split(key)

    def act(carry, key):
        s, alive = carry
        action = random.categorical(key, policy.apply(params, s))
        new = physics(s, action)
        alive = alive & (new[:, 0].abs() < 2.4) & (new[:, 2].abs() < 0.2)
        return (new, alive), (s, action, alive.float())

    s = random.uniform(start, (ENVIRONMENTS, 4), minval=-0.05, maxval=0.05)
    alive = torch.ones(ENVIRONMENTS, dtype=torch.bool)
    return fdl.scan(act, (s, alive), random.split(acts, STEPS))[1]


def step(params, key):
    states, actions, rewards = rollout(params, key)
    ahead = fdl.scan(
        lambda r, x: ((x + GAMMA * r),) * 2, torch.zeros(ENVIRONMENTS), rewards.flip(0)
    )
    returns = ahead[1].flip(0)
    advantage = (returns - returns.mean()) / (returns.std() + 1e-6)

    def loss_fn(params):
        log_prob = Categorical(logits=policy.apply(params, states)).log_prob(actions)
        return -(log_prob * advantage).mean()

    grads, loss = torch.func.grad_and_value(loss_fn)(params)
    return tree.map(lambda p, g: p - 0.1 * g, params, grads), (loss, rewards.sum(0).mean())


FAULT = "distributions check their arguments, which asks for values"
PROGRAM = Program(
    step,
    init=lambda: policy.init(random.key(0)),
    xs=lambda: random.split(random.key(1), 4),
    faults=dict.fromkeys(FORMS, FAULT),
)
