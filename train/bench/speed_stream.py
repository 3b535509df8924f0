"""What reading from disk costs a training loop: `python -m train.bench.speed_stream [--rounds 7]`.

A compiled LeNet trains on epochs of Fashion-MNIST (the sample, where that is all there is), in
calls of many steps. "resident" has the images in memory, and takes the rows of a batch in the
program; the others get chunks from `data.stream`, in the same order (but for Parquet). Rounds of
one epoch are interleaved in one process; the share is the median of the rate of a round over that
of the resident round beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import fdl
import models
from fdl import TrainState, data, losses, optim, random
from fdl.data import Batch, Dataset
from train.image_sets import load_images

BATCH = 256

Epoch = Callable[[TrainState], TrainState]


def sources(images: Dataset, index: torch.Tensor, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Return what `data.stream` reads from, with the indices that it takes."""
    np.save(folder / "x.npy", images.x.numpy())
    np.save(folder / "y.npy", images.y.numpy())
    loader = DataLoader(TensorDataset(*images), batch_sampler=index.tolist())
    found = {
        "memory": (images, index),
        ".npy files": (data.on_disk(folder / "x.npy", folder / "y.npy"), index),
        "DataLoader, no workers": (loader, None),
    }
    try:
        from pyarrow import FixedSizeListArray, array, parquet, table
    except ImportError:
        return found
    pixels = FixedSizeListArray.from_arrays(array(images.x.flatten().numpy()), 784)
    written = table({"image": pixels, "label": images.y.numpy()})
    parquet.write_table(written, folder / "images.parquet", row_group_size=len(images.y) // 10)
    in_order = torch.arange(index.numel()).view_as(index)  # random rows would read all of it
    read = data.table(folder / "images.parquet", "image", "label")
    return found | {"Parquet, in its order": (read, in_order)}


def ways(images: Dataset, index: torch.Tensor, steps: int, folder: Path) -> dict[str, Epoch]:
    """Return an epoch of each way, a function of the state."""
    step = fdl.train_step(fdl.supervised(models.lenet(), losses.cross_entropy), optim.sgd(0.1, 0.9))

    def of_batch(state: TrainState, batch: Batch) -> Any:
        x = batch.x.reshape(-1, 28, 28)  # rows of a table are flat
        return step(state, batch._replace(x=data.to_float(x)))

    def resident(state: TrainState, images: Dataset, rows: torch.Tensor) -> TrainState:
        return fdl.scan(lambda s, row: of_batch(s, data.batch(images, row)), state, rows)[0]

    from_memory = fdl.jit(resident, donate_argnums=0)
    from_chunk = fdl.jit(lambda s, chunk: fdl.scan(of_batch, s, chunk)[0], donate_argnums=0)

    def epoch(state: TrainState) -> TrainState:
        for rows in index.split(steps):
            state = from_memory(state, images, rows)
        return state

    def streamed(source: Any, indices: Any) -> Epoch:
        def epoch(state: TrainState) -> TrainState:
            for chunk in data.stream(source, indices, steps):
                state = from_chunk(state, chunk)
            return state

        return epoch

    found = {name: streamed(*pair) for name, pair in sources(images, index, folder).items()}
    return {"resident": epoch} | found


def measure(rounds: int, steps: int, folder: Path) -> None:
    """Print the rate of each way, and its share of the resident one."""
    images, _, description = load_images("auto")
    whole = data.epoch_indices(random.key(0), len(images.x), BATCH, drop_last=True).index
    index = whole[: len(whole) // steps * steps]  # whole chunks, so that there is one program
    epochs = ways(images, index, steps, folder)
    opt = optim.sgd(0.1, 0.9)
    states = {
        name: epoch(TrainState.create(models.lenet(), opt, key=random.key(1)))
        for name, epoch in epochs.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(rounds):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            states[name] = epoch(states[name])
            float(states[name].step)  # waits for the last
            rates[name].append(index.numel() / (time.perf_counter() - start))
    print(f"{description}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{len(index)} steps of {BATCH}, {steps} in a call")
    print("\n| source | images/s | of the resident rate |\n|---|---:|---:|")
    for name, found in rates.items():
        share = statistics.median(a / b for a, b in zip(found, rates["resident"], strict=True))
        print(f"| {name} | {statistics.median(found):,.0f} | {share:.1%} |", flush=True)


def main() -> None:
    """Measure all sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=26, help="steps in a call")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args.rounds, args.steps, Path(folder))


if __name__ == "__main__":
    main()
