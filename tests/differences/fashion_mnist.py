"""Measures docs/differences/fashion-mnist.md: the images as they are in the files."""

from functools import cache, partial
from pathlib import Path

import torch

from fdl import data
from tests.differences.tables import Table

FOLDER = Path("/usr/share/datasets/fashion-mnist")


@cache
def images(split):
    """The images of a split, uint8 [n, 784], and their labels."""
    x, y = data.fashion_mnist(FOLDER, train=split == "train", download=False)
    return x.view(len(x), 784), y


@cache
def groups(split, coarse=False):
    """The rows of each different image, by its bytes, or by those of its coarse copy."""
    found = {}
    for i, image in enumerate(seen(split, coarse).numpy()):
        found.setdefault(image.tobytes(), []).append(i)
    return found


def seen(split, coarse):
    """The images, or the means of their 49 blocks of 4 × 4 pixels in steps of 32."""
    x = images(split)[0]
    if not coarse:
        return x
    blocks = x.view(-1, 7, 4, 7, 4).float().mean((2, 4))
    return (blocks / 32).round().to(torch.uint8)


def within(split, coarse):
    """How many images of a split are there more than once."""
    more = [rows for rows in groups(split, coarse).values() if len(rows) > 1]
    labels = images(split)[1]
    mixed = [rows for rows in more if len(set(labels[rows].tolist())) > 1]
    return {
        "observed": f"{sum(map(len, more))} images in {len(more)} groups, "
        f"{len(mixed)} of them with more than one label"
    }


def leaked(coarse):
    """The rows of the test set that are in the training set as well."""
    train, test = groups("train", coarse), groups("test", coarse)
    return sorted(i for image, rows in test.items() if image in train for i in rows)


def between(coarse):
    """How many test images are in the training set, and how many of them under another label."""
    train, rows = groups("train", coarse), leaked(coarse)
    coarse_or_not, labels = seen("test", coarse), images("test")[1]
    other = [
        i
        for i in rows
        if labels[i] not in images("train")[1][train[coarse_or_not[i].numpy().tobytes()]]
    ]
    return {"observed": f"{len(rows)} test images, {len(other)} only under another label"}


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


def accuracy(kept):
    """The accuracy of least squares on some test images."""
    right = predictions()
    rows = torch.ones(len(right), dtype=torch.bool)
    if kept is not None:
        rows[leaked(kept)] = False
    return {"observed": f"{right[rows].double().mean():.4f} of {int(rows.sum())}"}


def if_there(measure):
    """A row that is left as it is where the full data set is missing."""
    return measure() if FOLDER.is_dir() else {}


SPLITS = ("train", "test")
ROWS = {
    **{f"{s}: mean and deviation of the pixels": partial(moments, s) for s in SPLITS},
    **{f"{s}: order of classes": partial(order, s) for s in SPLITS},
    **{f"{s}: images there more than once": partial(within, s, False) for s in SPLITS},
    "test images that are in train": partial(between, False),
    **{f"{s}: images alike in 49 grey blocks": partial(within, s, True) for s in SPLITS},
    "test images alike to one of train in 49 grey blocks": partial(between, True),
    "least squares: accuracy on all test images": partial(accuracy, None),
    "least squares: without test images that are in train": partial(accuracy, False),
    "least squares: without those alike to one of train": partial(accuracy, True),
}

TABLES = (
    Table(
        "images",
        ("what", "observed"),
        {name: partial(if_there, measure) for name, measure in ROWS.items()},
        ("torch",),
    ),
)
