"""Causal attention, masked by hand and by torch's kernel: two layers refine a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from fdl._torch_compat import RELEASE
from tests.support.programs import Program

HEADS, WIDTH, LENGTH = 2, 8, 6


def heads(x):
    return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(-2, -3)


def attend(params, x):
    q, k, v = map(heads, (x @ params["qkv"]).chunk(3, -1))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q @ k.mT / (WIDTH // HEADS) ** 0.5
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    by_hand = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
    both = (0.75 * fused + 0.25 * by_hand).transpose(-2, -3).flatten(-2)
    return F.layer_norm(x + both @ params["out"], (WIDTH,))


def step(params, x):
    first = attend(params, x)
    second = attend(params, first)
    params = {"qkv": params["qkv"] * 0.9, "out": params["out"] + 0.1 * second.mean((0, 1))}
    return params, (second - first).square().mean(-1)


def init():
    qkv, out = random.split(random.key(0))
    return {
        "qkv": random.normal(qkv, (WIDTH, 3 * WIDTH), torch.float64) / 3,
        "out": random.normal(out, (WIDTH, WIDTH), torch.float64) / 3,
    }


def xs():
    return random.normal(random.key(1), (4, 2, LENGTH, WIDTH), torch.float64)


FAULT = "torch 2.11: its kernel takes a mask of float32 for float64 when traced with a gradient"
PROGRAM = Program(
    step,
    init,
    xs,
    vmap="performance drop",
    faults={"grad": FAULT} if RELEASE < (2, 12) else {},
)
