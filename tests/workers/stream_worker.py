"""What one of several processes computes on its own part of the data; see test_processes.py."""

import sys
import time
from pathlib import Path

import torch

import fdl
from fdl import data, io, losses, nn, optim, random

KEY = random.key(3)
N, BATCH, CHUNK, PROCESSES = 60, 4, 2, 2
AUGMENTATIONS = (
    lambda key, x: data.random_crop(key, x, 2),
    data.random_flip,
    lambda key, x: data.random_rotation(key, x, 30.0),
    lambda key, x: data.random_brightness(key, x, 0.4),
    lambda key, x: data.random_cutout(key, x, 3),
)


def augmented(rank: int | None) -> list[torch.Tensor]:
    """Augment a batch of images with a key for each; of a rank, its own images alone."""
    images = random.uniform(random.key(1), (8, 1, 9, 9))
    keys = random.split(KEY, 8)
    own = slice(None) if rank is None else slice(4 * rank, 4 * (rank + 1))
    return [
        torch.vmap(lambda key, x, f=f: f(key, x[None])[0])(keys[own], images[own])
        for f in AUGMENTATIONS
    ]


def trained(folder: Path, pause: float = 0.0) -> fdl.TrainState:
    """Train on rows of files, from the last chunk that was saved, for two epochs."""
    model, opt = nn.sequential(nn.linear(3, 2), nn.dropout(0.3), nn.linear(2, 1)), optim.adam(0.1)
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    state = fdl.TrainState.create(model, opt, key=KEY)
    saved = folder / "state.safetensors"
    if saved.exists():
        state = io.load(saved, like=state)
    read = data.on_disk(folder / "x.npy", folder / "y.npy")
    steps = N // BATCH
    for epoch in range(int(state.step) // steps, 2):
        order = data.epoch_indices(random.fold_in(KEY, epoch), N, BATCH)
        left = data.take(order, torch.arange(int(state.step) - epoch * steps, steps))
        for chunk in data.stream(read, left, CHUNK):
            state, _ = fdl.scan(step, state, chunk)
            io.save(saved, state)
            print(int(state.step), flush=True)
            time.sleep(pause)
    return state


if __name__ == "__main__":
    if sys.argv[1] == "augment":
        io.save(sys.argv[3], augmented(int(sys.argv[2])))
    else:
        trained(Path(sys.argv[2]), pause=0.1)
