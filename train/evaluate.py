"""Use a saved run: `python -m train eval RUN` and `predict RUN IMAGE…`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import TrainState, data
from fdl.checkpointing import Restored, _folder
from fdl.nn import Model, StatefulModel
from train import loop, recipes, run_folder
from train.config import Eval, Images, Predict, Recipe
from train.image_sets import IMAGE_SETS
from train.images import read_image
from train.records import MONITORED

__all__ = ["Loaded", "apply", "evaluate", "load", "predict"]

MOST = 10  # classes to print, the likeliest


class Loaded(NamedTuple):
    """A saved run, with the state to evaluate."""

    folder: Path
    run: run_folder.Saved
    problem: recipes.Problem
    state: TrainState
    step: int


def load(config: Eval) -> Loaded:
    """Load a run and its checkpoint, on the device and with the data of the options.

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
    state, checkpoint = _checkpoint(folder, options, like=state, device=device)
    return Loaded(folder, run, problem, state, checkpoint.step)


def evaluate(config: Eval) -> int:
    """Print the metrics of the checkpoint of a run; return 0.

    Raises:
        ValueError: there is no run or no checkpoint, or `--data` is given for a run on drawn data.
    """
    _, run, problem, state, step = load(config)
    print(f"{run.recipe} after step {step}: {problem.data}; {state.key.device}")
    for part, dataset in loop.held_out(problem) or [("train", problem.train)]:
        for name, value in loop.evaluate_eagerly(problem, state, dataset).items():
            print(f"{part} {name} {value:.6g}")
    return 0


def apply(model: Model | StatefulModel, state: TrainState, x: Tensor) -> Tensor:
    """Apply a model with the parameters and buffers of a state, as in evaluation."""
    if isinstance(model, StatefulModel):
        return model.apply(state.params, state.buffers, x)[0]
    y: Tensor = model.apply(state.params, x)
    return y


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
    state = _checkpoint(folder, run.config, like=None, device=device).state
    logits = apply(model, state, data.to_float(images))
    width = max(12, *map(len, like.labels))
    for path, (_, note), row in zip(config.images, read, logits.float().softmax(1), strict=True):
        first, *_ = ranked = sorted(zip(row.tolist(), like.labels, strict=True), reverse=True)
        print(f"{path}: {first[1]}", *([f"    {note}"] if note else []), sep="\n")
        for p, name in ranked[:MOST]:
            print(f"    {name:{width}} {p:.4f}")
    return 0


def _checkpoint(
    folder: Path, options: Recipe, *, like: Any, device: torch.device | str
) -> Restored:
    """Restore the newest checkpoint of a run; with `--patience`, that of its best epoch."""
    path = folder / "checkpoints"
    restored = None
    if path.is_dir():
        files = _folder.files_in(path) if options.patience else []
        best = _folder.best_of(_folder.readable(files), MONITORED, "min")
        restored = _folder.restore(path, best, like=like, device=device)
    if restored is None:
        raise ValueError(f"{folder} holds no checkpoint yet: there is none in {path}")
    return restored
