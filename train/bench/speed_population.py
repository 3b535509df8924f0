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
from pathlib import Path
from typing import Any

import torch
from torch.func import vmap

import fdl
import models
from fdl import data, losses, nn, optim, population, random, tree
from fdl.data import Indices
from fdl.transforms import sequential_vmap
from train.records import to_json

__all__ = ["measure", "table"]

MODELS: dict[str, Callable[[], nn.Model]] = {"mlp": models.mlp, "lenet": models.lenet}
WAYS = (
    "one model",
    "vmap, one order",
    "vmap, own orders",
    "sequential, one order",
    "sequential, own orders",
)
Record = dict[str, Any]


def measure(
    name: str, members: int, rounds: int, steps: int, device: str, chosen: list[str]
) -> Record:
    """Time a step of a population and of one model, in the ways that are chosen."""
    model, opt, keys = MODELS[name](), optim.sgd(0.5), random.split(random.key(0, device), members)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    images = tree.to(data.fashion_mnist_sample(), device)
    orders = [data.epoch_indices(key, len(images.x), 256) for key in keys]
    shared = tree.map(lambda leaf: leaf[:steps], orders[0])
    own = Indices(*(torch.stack(leaves, 1)[:steps] for leaves in zip(*orders, strict=True)))
    one, many = fdl.TrainState.create(model, opt, key=keys[0]), population.create(model, opt, keys)

    def with_data(state: Any, row: Any, images: Any) -> Any:
        return step(state, data.to_float(data.batch(images, row)))

    arguments: list[tuple[Any, Any, Any]] = [
        (with_data, one, shared),
        (vmap(with_data, (0, None, None)), many, shared),
        (vmap(with_data, (0, 0, None)), many, own),
        (sequential_vmap(with_data, (0, None, None)), many, shared),
        (sequential_vmap(with_data, (0, 0, None)), many, own),
    ]
    ways = {way: of for way, of in zip(WAYS, arguments, strict=True) if way in chosen}
    runs, losses_of, times = {}, dict[str, float](), {way: list[float]() for way in ways}
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
            else:
                losses_of[way] = loss
    medians = {way: statistics.median(ts) for way, ts in times.items()}
    return {
        "model": name,
        "members": members,
        "steps": steps,
        "ms": medians,
        "loss": losses_of,  # of member 0 in the last step
    }


def table(entries: list[Record]) -> str:
    """Show the time of a step in each way, and its ratio to that of one model."""
    lines = []
    for entry in entries:
        lines.append(
            f"{entry['model']}, {entry['members']} members: ms a step, that over one model's, "
            f"loss of member 0 after {entry['steps']} steps"
        )
        base = entry["ms"].get("one model")
        for way, median in entry["ms"].items():
            ratio = f"{median / base:.1f}" if base else ""
            lines.append(f"    {way:22}{median:9.2f}{ratio:>8}{entry['loss'][way]:11.6f}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    sizes = (options.members, options.rounds, options.steps, options.device)
    entries = []
    for name in options.models:
        entries.append(measure(name, *sizes, options.ways))
        print(table(entries[-1:]), flush=True)
    if options.out:
        options.out.write_text(to_json(entries, indent=1) + "\n")
