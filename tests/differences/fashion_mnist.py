"""Measures docs/differences/fashion-mnist.md: the images as they are in the files."""

import os
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch

from fdl import data
from tests.differences.tables import Table
from train import config, evaluate

FOLDER = Path("/usr/share/datasets/fashion-mnist")


@cache
def images(split):
    """The images of a split, uint8 [n, 784], and their labels."""
    x, y = data.fashion_mnist(FOLDER, train=split == "train", download=False)
    return x.view(len(x), 784), y


def within(split):
    """How many images of a split are there more than once, byte by byte."""
    x = images(split)[0]
    return {"observed": f"{len(x) - len(torch.unique(x, dim=0))} of {len(x)}"}


def between():
    """How many test images are in the training set, byte by byte."""
    train = {image.tobytes() for image in images("train")[0].numpy()}
    found = sum(image.tobytes() in train for image in images("test")[0].numpy())
    return {"observed": f"{found} of {len(images('test')[0])}"}


@cache
def nearest():
    """The training image next to each test image, and the root of their mean squared distance."""
    train, test = (images(split)[0].float() for split in ("train", "test"))
    squares = (train**2).sum(1)
    rows = torch.cat([(squares - 2 * part @ train.T).argmin(1) for part in test.split(500)])
    return rows, ((test - train[rows]) ** 2).mean(1).sqrt()


def near(bound):
    """How many test images have a training image within a distance, and how many another label."""
    rows, distance = nearest()
    close = distance <= bound
    other = close & (images("test")[1] != images("train")[1][rows])
    return {"observed": f"{int(close.sum())} of {len(rows)}, {int(other.sum())} with another label"}


def distances():
    """The smallest of these distances, and their median."""
    found = nearest()[1]
    return {"observed": f"smallest {float(found.min()):.2f}, median {float(found.median()):.1f}"}


def moments(split):
    """Mean and deviation of the pixels, over all of them, as fractions of 255."""
    x = images(split)[0].double() / 255
    return {"observed": f"mean {x.mean():.6f}, deviation {x.std(correction=0):.6f}"}


def order(split):
    """The labels in front, and how many images a class has."""
    y = images(split)[1]
    counts = torch.bincount(y, minlength=10)
    return {
        "observed": f"begins {', '.join(map(str, y[:10].tolist()))}; "
        f"{int(counts.min())} to {int(counts.max())} images a class"
    }


@cache
def predictions():
    """What least squares on the pixels, with a little ridge, says of the test images."""
    x, y = images("train")
    design = torch.cat([x.double() / 255, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    target = torch.nn.functional.one_hot(y, 10).double()
    gram = design.T @ design + 1e-3 * torch.eye(785, dtype=torch.float64)
    weights = torch.linalg.solve(gram, design.T @ target)
    x, y = images("test")
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    return (torch.cat([x.double() / 255, ones], 1) @ weights).argmax(1) == y


def apart(bound):
    """Which test images have no training image that near; all for a bound below 0."""
    return nearest()[1] > bound


def accuracy(bound):
    """The accuracy of least squares on the test images that have no training image that near."""
    rows = apart(bound)
    return {"observed": f"{float(predictions()[rows].double().mean()):.4f} of {int(rows.sum())}"}


def of_recipe(recipe):
    """Train a recipe of `train` with its defaults, seed 0; its accuracy on the same parts."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = ["--data", str(FOLDER), "--out", str(run), "--seed", "0"]
        subprocess.run(
            [sys.executable, "-m", "train", recipe, *options],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # with others, sums are rounded otherwise
        )
        loaded = evaluate.load(config.Eval(run))
        x, y = loaded.problem.test
        parts = data.to_float(x).split(1000)
        logits = [evaluate.apply(loaded.problem.model, loaded.state, part) for part in parts]
    right = torch.cat(logits).argmax(1) == y
    return {
        name: f"{float(right[apart(bound)].double().mean()):.4f}" for name, bound in PARTS.items()
    }


def if_there(measure):
    """A row that is left as it is where the full data set is missing."""
    return measure() if FOLDER.is_dir() else {}


PARTS = {"all test images": -1, "without those within 8": 8, "without those within 16": 16}
RECIPES = ("softmax", "mlp", "dropout", "lenet", "lenet-bn")
SPLITS = ("train", "test")
ROWS = {
    **{f"{s}: mean and deviation of the pixels": partial(moments, s) for s in SPLITS},
    **{f"{s}: order of classes": partial(order, s) for s in SPLITS},
    **{f"{s}: images that are there before": partial(within, s) for s in SPLITS},
    "test images that are in train": between,
    "distance of a test image from the nearest of train": distances,
    **{f"test images within {b} of one of train": partial(near, b) for b in (8, 16)},
    "least squares: accuracy on all test images": partial(accuracy, -1),
    **{f"least squares: without those within {b}": partial(accuracy, b) for b in (8, 16)},
}

TABLES = (
    Table(
        "images",
        ("what", "observed"),
        {name: partial(if_there, measure) for name, measure in ROWS.items()},
        ("torch",),
    ),
    Table(
        "recipes",
        ("recipe", *PARTS),
        {name: partial(if_there, partial(of_recipe, name)) for name in RECIPES},
        ("torch",),
    ),
)
