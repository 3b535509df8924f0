"""Leaky integrate-and-fire neurons with a surrogate gradient by an autograd.Function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fdl
from fdl import random
from tests.support.programs import Program

TIME, INPUTS, HIDDEN, CLASSES = 6, 8, 12, 3


class Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v):
        return (v > 0).to(v.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad / (1 + 10 * v.abs()) ** 2


def simulate(params, current):
    def tick(state, current):
        v, out = state
        v = 0.9 * v + current @ params["in"]
        spikes = Spike.apply(v - 1.0)
        return (v - spikes, 0.9 * out + spikes @ params["out"]), spikes

    zero = current.new_zeros(5, HIDDEN), current.new_zeros(5, CLASSES)
    (_, out), spikes = fdl.scan(tick, zero, current)
    return out, spikes.mean()


def step(params, batch):
    current, labels = batch

    def loss_fn(params):
        out, rate = simulate(params, current)
        return F.cross_entropy(out, labels) + 0.01 * rate, rate

    grads, (loss, rate) = torch.func.grad_and_value(loss_fn, has_aux=True)(params)
    return {name: p - 0.2 * grads[name] for name, p in params.items()}, (loss, rate)


def init():
    first, second = random.split(random.key(0))
    w_in = random.normal(first, (INPUTS, HIDDEN)) / INPUTS**0.5
    w_out = random.normal(second, (HIDDEN, CLASSES)) / HIDDEN**0.5
    return {"in": w_in.double(), "out": w_out.double()}


def batches():
    current = 2 * random.uniform(random.key(1), (4, TIME, 5, INPUTS), torch.float64)
    return current, random.randint(random.key(2), (4, 5), 0, CLASSES)


PROGRAM = Program(step, init=init, xs=batches)
