"""The data sets of images: where they come from, and what a model must know of them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

from fdl import data
from fdl.data import Dataset
from fdl.data._fashion_mnist_download import one_line

__all__ = ["IMAGE_SETS", "DataSet", "ImageSet", "load_images"]

DataSet = Literal["fashion-mnist", "mnist", "kmnist", "emnist", "qmnist", "cifar10", "cifar100"]


class ImageSet(NamedTuple):
    """What a model, and the pictures it classifies, must know of a data set."""

    title: str
    labels: tuple[str, ...]  # the names of the classes
    channels: int = 1
    side: int = 28  # height and width of an image, in pixels
    mirrored: bool = False  # an image seen in a mirror has the same class
    margin: int = 0  # empty pixels on each side, around the object


DIGITS = tuple("0123456789")
OBJECTS = "airplane automobile bird cat deer dog frog horse ship truck"
FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""

IMAGE_SETS: dict[DataSet, ImageSet] = {
    "fashion-mnist": ImageSet("Fashion-MNIST", data.LABELS, mirrored=True),
    "mnist": ImageSet("MNIST", DIGITS, margin=4),
    "kmnist": ImageSet("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    # The split "balanced"; small letters that look like their capitals are in one class with them.
    "emnist": ImageSet(
        "EMNIST balanced", (*DIGITS, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"abdefghnqrt"), margin=2
    ),
    "qmnist": ImageSet("QMNIST", DIGITS, margin=4),
    "cifar10": ImageSet("CIFAR-10", tuple(OBJECTS.split()), 3, 32, mirrored=True),
    "cifar100": ImageSet("CIFAR-100", tuple(FINE.split()), 3, 32, mirrored=True),
}


# What torchvision raises without a network, and for files that are damaged.
FAILURES = (
    *(OSError, HTTPException, RuntimeError),
    *(AssertionError, LookupError, TypeError, ValueError),
)


def load_images(where: str, name: DataSet = "fashion-mnist") -> tuple[Dataset, Dataset, str]:
    """Load the training and test set of a data set, and describe them.

    Args:
        where: a folder, "auto", or "sample" of Fashion-MNIST. Of the others, the folder is the root
            of torchvision, which downloads what is not there; "auto" is `data`.
        name: the data set.

    Raises:
        FileNotFoundError: the folder does not hold the files.
        ValueError: a file is damaged, there is no such folder, or no sample of this data set, or
            torchvision can neither read nor download it.

    >>> train, test, description = load_images("sample")
    >>> len(train.x), len(test.x)
    (6000, 1000)
    """
    if where not in ("auto", "sample") and not Path(where).is_dir():
        raise ValueError(f"--data must be auto, sample or a folder, got {where!r}: no such folder")
    if name == "fashion-mnist":
        return _fashion_mnist(where)
    if where == "sample":
        raise ValueError(
            f"--data sample is a sample of Fashion-MNIST; of --data-set {name} there is none: give "
            "a folder, or leave --data out to download it"
        )
    return _by_torchvision("data" if where == "auto" else where, name)


def _fashion_mnist(where: str) -> tuple[Dataset, Dataset, str]:
    full = "Fashion-MNIST, 60,000 + 10,000 images"
    if where == "sample":
        return _both(data.fashion_mnist_sample, "a SAMPLE of Fashion-MNIST, 6,000 + 1,000 images")
    if where != "auto":
        return _both(lambda train: data.fashion_mnist(where, train=train, download=False), full)
    try:
        return _both(data.fashion_mnist, full)
    except FileNotFoundError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        print(
            textwrap.shorten(f"no Fashion-MNIST on this machine: {reason}", 80),
            "using the sample that comes with fdl instead, 6,000 + 1,000 of its images",
            sep="\n",
            file=sys.stderr,
        )
        return _fashion_mnist("sample")


def _both(read: Callable[..., Dataset], description: str) -> tuple[Dataset, Dataset, str]:
    return read(train=True), read(train=False), description


def _by_torchvision(root: str, name: DataSet) -> tuple[Dataset, Dataset, str]:
    """Load a data set that torchvision reads, and downloads into `root` if it is not there."""
    from torchvision import datasets

    kind = getattr(datasets, name.upper())
    split = {"split": "balanced"} if name == "emnist" else {}
    known = IMAGE_SETS[name]
    try:
        train, test = (
            data.from_torchvision(kind(root, train=train, download=True, **split))
            for train in (True, False)
        )
    except FAILURES as error:
        raise ValueError(
            f"--data-set {name}: torchvision could neither read it from {root} nor download it: "
            f"{one_line(error)}"
        ) from error
    for part in (train, test):
        shape = (known.channels, known.side, known.side)[known.channels == 1 :]
        classes = len(known.labels)
        if part.x.shape[1:] != shape or not bool(((part.y >= 0) & (part.y < classes)).all()):
            raise ValueError(
                f"--data-set {name}: {root} must hold images {list(shape)} and labels 0 to "
                f"{classes - 1}, got {list(part.x.shape[1:])} and labels {int(part.y.min())} to "
                f"{int(part.y.max())}; remove it, and torchvision downloads it again"
            )
    return train, test, f"{known.title}, {len(train.x):,} + {len(test.x):,} images"
