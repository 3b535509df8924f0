"""The commands of `python -m train`."""

from __future__ import annotations

import logging
import sys
import time

from fdl import data, random, tree
from fdl.io import inspect
from train import compare, evaluate, look, options, plots, recipes, records, run, run_folder
from train import config as configs
from train.bench import measure
from train.bench.config import Bench
from train.image_sets import IMAGE_SETS, load_images
from train.sweep import run as sweep

__all__ = ["main"]


def main() -> int:
    """Run one command.

    Returns:
        0 done; 1 diverged; 2 an option is wrong; 74 a result could not be written; 75 ended by
        SIGTERM with everything saved, start it again with --resume; 130 interrupted.
    """
    # It warns on machines with CUDA's compiler but no GPU; the first line names the device anyway.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    name, config = options.parse(sys.argv[1:])
    if isinstance(config, configs.Recipe):
        return run.run(name, config)
    try:
        if isinstance(config, configs.Sweep):
            return sweep.run(config)
        configs.check(config)
        match config:
            case configs.Compare():
                return compare.compare(config)
            case configs.Data():
                return show_data(config)
            case configs.Inspect():
                return show_file(config)
            case Bench():
                return measure.run(config)
            case configs.Look():  # before Eval, whose options it has
                return look.look(config)
            case configs.Eval():
                return evaluate.evaluate(config)
            case configs.Predict():
                return evaluate.predict(config)
        raise AssertionError(f"no command for {config!r}")
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show_data(config: configs.Data) -> int:
    """Draw ten images with their labels, and time one pass over the training set."""
    device = recipes.find_device(config.device)
    train_set, _, description = load_images(config.data, config.data_set)
    train_set = tree.to(train_set, device)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "images.png"
    plots.draw_images(path, train_set, IMAGE_SETS[config.data_set].labels)
    print(f"{description}; {device}\nten images with their labels: {path}")
    start = time.perf_counter()
    n = len(train_set.x)
    order = data.epoch_indices(random.key(config.seed, device), n, config.batch_size)
    for row in zip(*order, strict=True):
        batch = data.to_float(data.batch(train_set, row))
    float(batch.x.sum())  # on CUDA, wait for the last one
    seconds = time.perf_counter() - start
    print(
        f"one pass, shuffled, in {len(order.index)} batches of {config.batch_size}: "
        f"{seconds:.3f} s, {n / seconds:,.0f} images/s"
    )
    return 0


def show_file(config: configs.Inspect) -> int:
    """Print the table of a saved tree and its metadata."""
    path = config.file
    if path.is_dir():
        path = run_folder.newest(path) / "params.safetensors"
    info = inspect(path)
    print(info)
    if info.metadata:
        print("metadata", records.to_json(info.metadata, indent=2))
    return 0
