"""What saving costs a training loop: `python -m train.bench.speed_async [--rounds 7]`.

Rounds without saving, with `Checkpointer` once a round, and with `fdl.io.save` once a round, which
waits for the disk, are interleaved in one process. A round is one compiled call of many steps, as
in `train`. "blocked" is how long `Checkpointer.save` kept the loop; what its thread takes from the
cores while the next steps run is in the time of the rounds, which end when the steps do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fdl
from fdl import TrainState, data, jit, losses, nn, optim, random, scan, tree
from fdl.checkpointing import Checkpointer

WIDTHS = {"784-256-10": (256,), "784-2048-2048-10": (2048, 2048)}
SECONDS = 4.0  # of steps between two checkpoints


def make(widths: tuple[int, ...]) -> tuple[Callable[..., TrainState], TrainState]:
    """An MLP with Adam: the compiled function of many steps, and a state."""
    sizes = (784, *widths, 10)
    layers = [nn.linear(a, b) for a, b in pairwise(sizes)]
    model = nn.sequential(nn.flatten(), *[x for layer in layers for x in (layer, nn.relu)][:-1])
    opt = optim.adam(1e-3)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)

    def steps(state: TrainState, images: data.Dataset, indices: data.Indices) -> TrainState:
        def body(state: TrainState, row: data.Indices) -> tuple[TrainState, Any]:
            return step(state, data.to_float(data.batch(images, row)))

        return scan(body, state, indices)[0]

    return jit(steps, donate_argnums=0), TrainState.create(model, opt, key=random.key(0))


def measure(name: str, rounds: int, folder: Path) -> None:
    """Print how much saving slows the training of one model."""
    run, state = make(WIDTHS[name])
    images = data.fashion_mnist_sample()
    indices = data.epoch_indices(random.key(1), 6000, 256)
    state = run(state, images, indices)
    start = time.perf_counter()
    state = run(state, images, indices)
    repeats = max(1, round(SECONDS / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {"nothing": [], "Checkpointer": [], "fdl.io.save": []}
    blocked = []
    with Checkpointer(folder, keep=1) as checkpointer:
        for _ in range(rounds):
            for way, found in times.items():
                start = time.perf_counter()
                if way == "Checkpointer":
                    checkpointer.save(state)
                    blocked.append(time.perf_counter() - start)
                elif way == "fdl.io.save":
                    fdl.io.save(folder / "it.safetensors", state)
                for _ in range(repeats):
                    state = run(state, images, indices)
                found.append(time.perf_counter() - start)
                checkpointer.wait()  # so that the next way does not pay for this one
    size = sum(leaf.nbytes for leaf in tree.leaves(state)) / 1e6
    base = statistics.median(times["nothing"])
    print(
        f"{name}, Adam, {size:.1f} MB, {repeats * len(indices.index)} steps in {base:.2f} s, "
        f"{torch.get_num_threads()} threads, {rounds} rounds"
    )
    for way, found in times.items():
        # Round by round: what slows the machine for a while is in both.
        costs = [t / t0 - 1 for t, t0 in zip(found, times["nothing"], strict=True)]
        print(
            f"    {way:13} {statistics.median(found):7.3f} s  {statistics.median(costs):+7.2%}"
            f"  ({min(costs):+.2%} to {max(costs):+.2%})"
        )
    print(f"    blocked       {statistics.median(blocked) * 1e3:7.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for name in WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, rounds, Path(folder))
