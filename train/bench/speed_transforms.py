"""Time per-sample gradients of LeNet against a loop: `python -m train.bench.speed_transforms`.

Milliseconds (median of interleaved rounds in one process) and the most bytes allocated at once,
beside the results, which are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

import fdl
from fdl import data, losses, random, tree
from fdl.transforms import clipped_grad_sum, per_sample_grads, per_sample_norms
from fdl.tree import Tree
from models.lenet import lenet


def peak(f: Callable[[], Any]) -> int:
    """Return the most bytes allocated at once during a call."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        f()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def time_in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each way, taken in turns after a first round that warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round in range(rounds + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            if round:
                times[way].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    """Print times and memory of per-sample gradients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32)
    args = parser.parse_args()

    model = lenet()
    params = model.init(random.key(0))
    loss = fdl.supervised(model, losses.cross_entropy)
    sample = data.fashion_mnist_sample()
    row = data.take(data.sequential_indices(6000, args.batch), 0)
    x, y, _ = data.to_float(data.batch(sample, row))

    def one(params: Tree, x: Tensor, y: Tensor) -> Tensor:
        return loss(params, (x[None], y[None]))[0]

    def backward() -> Tree:
        rows = []
        for i in range(args.batch):
            leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
            one(leaves, x[i], y[i]).backward()
            rows.append(tree.map(lambda p: p.grad, leaves))
        return tree.stack(rows)

    def loop() -> Tree:
        return tree.stack([grad(one)(params, x[i], y[i]) for i in range(args.batch)])

    batch, c = (x, y), args.chunk
    jitted = fdl.jit(per_sample_grads(loss))
    jitted_sum = fdl.jit(clipped_grad_sum(loss, 1.0, c))
    ways: dict[str, Callable[[], Any]] = {
        "loop of backward()": backward,
        "loop of torch.func.grad": loop,
        "vmap(grad)": lambda: vmap(grad(one), (None, 0, 0))(params, x, y),
        "per_sample_grads": lambda: per_sample_grads(loss)(params, batch),
        f"per_sample_grads, chunk {c}": lambda: per_sample_grads(loss, c)(params, batch),
        "fdl.jit(per_sample_grads)": lambda: jitted(params, batch),
        "per_sample_norms": lambda: per_sample_norms(loss)(params, batch),
        f"per_sample_norms, chunk {c}": lambda: per_sample_norms(loss, c)(params, batch),
        "clipped_grad_sum": lambda: clipped_grad_sum(loss, 1.0)(params, batch),
        f"clipped_grad_sum, chunk {c}": lambda: clipped_grad_sum(loss, 1.0, c)(params, batch),
        f"fdl.jit(clipped_grad_sum), chunk {c}": lambda: jitted_sum(params, batch),
    }
    expected = backward()
    for way in list(ways)[1:6]:
        assert tree.allclose(expected, ways[way](), rtol=1e-3, atol=1e-5), way
    times = time_in_turns(ways, args.rounds)
    print(
        f"LeNet, batch {args.batch}, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\n\n| | ms | of the loop | peak MB |\n|---|---|---|---|"
    )
    for way, run in ways.items():
        median = statistics.median(times[way])
        ratio = statistics.median(times["loop of backward()"]) / median
        print(f"| {way} | {median:.1f} | {ratio:.1f} × as fast | {peak(run) / 1e6:.0f} |")


if __name__ == "__main__":
    main()
