"""Time a step of many models against a step of one: `python -m train.bench.speed_population`.

A step is forward, backward and update on a batch of 256 images, all steps one compiled program.
Rounds are interleaved in one process; the ratios are those of medians. The last losses are given
too, since a wrong step is not a fast one. A loop over runs would have a ratio of [members].
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.func import vmap

import fdl
import models
from fdl import data, losses, nn, optim, population, random, tree
from fdl.data import Indices
from fdl.transforms import sequential_vmap

MODELS: dict[str, Callable[[], nn.Model]] = {"mlp": models.mlp, "lenet": models.lenet}


def measure(name: str, members: int, rounds: int, steps: int, device: str) -> None:
    """Print the time of a step of a population and of one model."""
    model, opt, keys = MODELS[name](), optim.sgd(0.5), random.split(random.key(0, device), members)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    images = tree.to(data.fashion_mnist_sample(), device)
    orders = [data.epoch_indices(key, len(images.x), 256) for key in keys]
    shared = tree.map(lambda leaf: leaf[:steps], orders[0])
    own = Indices(*(torch.stack(leaves, 1)[:steps] for leaves in zip(*orders, strict=True)))
    one, many = fdl.TrainState.create(model, opt, key=keys[0]), population.create(model, opt, keys)

    def with_data(state: Any, row: Any, images: Any) -> Any:
        return step(state, data.to_float(data.batch(images, row)))

    ways: dict[str, tuple[Any, Any, Any]] = {
        "one model": (with_data, one, shared),
        "vmap, one order": (vmap(with_data, (0, None, None)), many, shared),
        "vmap, own orders": (vmap(with_data, (0, 0, None)), many, own),
        "sequential, one order": (sequential_vmap(with_data, (0, None, None)), many, shared),
        "sequential, own orders": (sequential_vmap(with_data, (0, 0, None)), many, own),
    }
    runs, times = {}, {way: list[float]() for way in ways}
    for way, (f, state, rows) in ways.items():
        epoch = fdl.jit(
            lambda state, images, rows, f=f: fdl.scan(lambda s, r: f(s, r, images), state, rows)
        )
        runs[way] = epoch, state, rows
    for round in range(rounds + 1):
        for way, (epoch, state, rows) in runs.items():
            began = time.perf_counter()
            _, metrics = epoch(state, images, rows)
            loss = float(metrics["loss"].value[-1].flatten()[0])  # waits for a GPU
            if round:  # after the compiler and the first touch of memory
                times[way].append(1e3 * (time.perf_counter() - began) / steps)
            elif way != "one model":
                print(f"    {way}: loss of member 0 after {steps} steps {loss:.6f}")
    base = statistics.median(times["one model"])
    print(f"{name}, {members} members: ms a step, and that over one model's")
    for way, ts in times.items():
        median = statistics.median(ts)
        print(f"    {way:20}{median:9.2f}{median / base:8.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for name in MODELS:
        measure(name, options.members, options.rounds, options.steps, options.device)
