"""Use a saved run: `python -m train eval RUN` and `predict RUN IMAGE…`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fdl import data
from fdl.checkpointing import Restored, _folder
from fdl.nn import StatefulModel
from train import loop, recipes, run_folder
from train.config import Eval, Images, Predict
from train.image_sets import IMAGE_SETS
from train.images import read_image

__all__ = ["evaluate", "predict"]

MOST = 10  # classes to print, the likeliest


def evaluate(config: Eval) -> int:
    """Print the metrics of the newest checkpoint of a run; return 0.

    Raises:
        ValueError: there is no run or no checkpoint, or `--data` is given for a run on drawn data.
    """
    folder = run_folder.newest(config.run)
    run = run_folder.read_run(folder)
    options = run.config
    if config.data is not None:
        if not isinstance(options, Images):
            raise ValueError(f"--data: {folder} is a run of {run.recipe}, on drawn data")
        options = dataclasses.replace(options, data=config.data)
    device = recipes.find_device(config.device)
    problem, state, _ = recipes.set_up(options, device)
    state, checkpoint = _newest_checkpoint(folder, like=state, device=device)
    print(f"{run.recipe} after step {checkpoint.step}: {problem.data}; {device}")
    for part, dataset in loop.held_out(problem) or [("train", problem.train)]:
        for name, value in loop.evaluate_eagerly(problem, state, dataset).items():
            print(f"{part} {name} {value:.6g}")
    return 0


def predict(config: Predict) -> int:
    """Print the label of each image and the probabilities of the ten likeliest classes; return 0.

    Raises:
        ValueError: the run is not on images or has no checkpoint, or a file is not an image.
    """
    folder = run_folder.newest(config.run)
    run = run_folder.read_run(folder)
    if not isinstance(run.config, Images):
        raise ValueError(f"predict needs a run on images, got {folder}, a run of {run.recipe}")
    device = recipes.find_device(config.device)
    model = recipes.image_model(run.config)
    like = IMAGE_SETS[run.config.data_set]
    read = [read_image(path, config.invert, like) for path in config.images]
    images = torch.stack([image for image, _ in read]).to(device)
    state = _newest_checkpoint(folder, like=None, device=device).state
    x = data.to_float(images)
    if isinstance(model, StatefulModel):
        logits, _ = model.apply(state.params, state.buffers, x)
    else:
        logits = model.apply(state.params, x)
    width = max(12, *map(len, like.labels))
    for path, (_, note), row in zip(config.images, read, logits.float().softmax(1), strict=True):
        first, *_ = ranked = sorted(zip(row.tolist(), like.labels, strict=True), reverse=True)
        print(f"{path}: {first[1]}", *([f"    {note}"] if note else []), sep="\n")
        for p, name in ranked[:MOST]:
            print(f"    {name:{width}} {p:.4f}")
    return 0


def _newest_checkpoint(folder: Path, *, like: Any, device: torch.device | str) -> Restored:
    path = folder / "checkpoints"
    restored = _folder.restore(path, like=like, device=device) if path.is_dir() else None
    if restored is None:
        raise ValueError(f"{folder} holds no checkpoint yet: there is none in {path}")
    return restored
