"""Time recurrence and attention against torch's: `python -m train.bench.speed_layers`.

Gradients of a GRU and of multi-head attention, in milliseconds (median and least of interleaved
rounds in one process). The gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

import fdl
from fdl import nn, random, tree
from fdl.tree import Tree
from train.bench.speed_transforms import time_in_turns

Ways = dict[str, Callable[[], Tree]]


def gradients_of(module: torch.nn.Module, call: Callable[[], Tensor]) -> Callable[[], Tree]:
    """Return a function that computes the gradients of a module by `backward()`."""

    def run() -> Tree:
        module.zero_grad()
        call().square().mean().backward()
        return tree.unflatten_dict({name: p.grad for name, p in module.named_parameters()})

    return run


def gru(batch: int, steps: int, units: int) -> Ways:
    """Gradients of one GRU by torch's module, by the compiled loop, and by fdl."""
    layer = nn.gru(units, units)
    params = layer.init(random.key(0))
    x = random.normal(random.key(1), (batch, steps, units))
    module = torch.nn.GRU(units, units, batch_first=True)
    module.load_state_dict(params)
    gradients = grad(lambda params, x: layer.apply(params, x)[0].square().mean())
    compiled, jitted = torch.compile(gradients, fullgraph=True), fdl.jit(gradients, strict=True)
    return {
        "nn.GRU, eager": gradients_of(module, lambda: module(x)[0]),
        "the loop of fdl.nn.gru, torch.compile": lambda: compiled(params, x),
        "fdl.nn.gru, fdl.jit": lambda: jitted(params, x),
    }


class Attention(torch.nn.Module):
    """Multi-head self-attention by `F.scaled_dot_product_attention`.

    >>> Attention(4, 2)(torch.zeros(1, 3, 4)).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = torch.nn.Parameter(torch.zeros(3 * features, features))
        self.in_proj_bias = torch.nn.Parameter(torch.zeros(3 * features))
        self.out_proj = torch.nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, length, features]` to the same shape."""
        parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def attention(batch: int, length: int, features: int, heads: int) -> Ways:
    """Gradients of one attention by torch's fused operation, eager and compiled, and by fdl."""
    layer = nn.multihead_attention(features, heads)
    params = layer.init(random.key(0))
    x = random.normal(random.key(1), (batch, length, features))
    module = Attention(features, heads)
    module.load_state_dict(tree.flatten_dict(params))
    compiled = torch.compile(module, fullgraph=True)
    jitted = fdl.jit(grad(lambda p, x: layer.apply(p, x).square().mean()), strict=True)
    return {
        "F.scaled_dot_product_attention, eager": gradients_of(module, lambda: module(x)),
        "F.scaled_dot_product_attention, torch.compile": gradients_of(module, lambda: compiled(x)),
        "fdl.nn.multihead_attention, fdl.jit": lambda: jitted(params, x),
    }


def measure(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Compare the gradients of all ways with the first, and time them in turns, in ms."""
    expected = next(iter(ways.values()))()
    for way, run in ways.items():
        assert tree.allclose(expected, run(), rtol=1e-3, atol=1e-6), way
    return time_in_turns(ways, rounds)


def main() -> None:
    """Print the times of every way, and fdl's share of each peer's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    subjects: dict[str, Any] = {
        "GRU of 256 units, 100 steps, batch 64": lambda: gru(64, 100, 256),
        "attention of 256 features, 8 heads, 128 places, batch 32": (
            lambda: attention(32, 128, 256, 8)
        ),
    }
    for subject, make in subjects.items():
        times = measure(make(), args.rounds)
        *_, ours = times.values()
        print(f"\n| {subject} | median ms | least ms | fdl's share |\n|---|---|---|---|")
        for way, found in times.items():
            share = statistics.median(ours) / statistics.median(found)
            print(f"| {way} | {statistics.median(found):.2f} | {min(found):.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
