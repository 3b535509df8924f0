"""Fashion-MNIST, whole or a tenth of it."""

from __future__ import annotations

import os

from fdl.data import _fashion_mnist_files
from fdl.data._types import Dataset


def fashion_mnist(
    root: str | os.PathLike[str] | None = None, *, train: bool = True, download: bool = True
) -> Dataset:
    """Read Fashion-MNIST: 28×28 grey images of clothes in ten classes (see `LABELS`).

    It comes from the first of these places that has it: `root`, `data/FashionMNIST/raw` below the
    working directory (where torchvision is usually told to put it), and
    `/usr/share/datasets/fashion-mnist` (the Debian package `dataset-fashion-mnist`). If none has
    it, torchvision downloads it, into `root` or else `data`.

    `root` may hold the four IDX files, gzipped or not, itself or in `FashionMNIST/raw`; a `.npz`
    file with x_train, y_train, x_test and y_test; or Parquet files as Hugging Face serves them
    (`pip install 'fdl[parquet]'`). Contents are verified, so all give the same tensors or an error.

    Args:
        root: A folder that holds the images, or that torchvision is or was given as its `root`, or
            the `.npz` file itself.
        train: The 60,000 training images if true, the 10,000 test images if false.
        download: Whether to download what is in none of the places. If false, a `root` that holds
            nothing but other files is an error.

    Returns:
        `x` uint8 [n, 28, 28], 0 (background) to 255, and `y` int64 [n], the classes 0 to 9.

    Raises:
        FileNotFoundError: The images are in none of the places and were not downloaded, or `root`
            holds only other files; the error lists them, and what can be read.
        ValueError: A file that was found is damaged, or holds other images; no other place is
            tried then.
        ImportError: They are in Parquet files, and pyarrow is not installed.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747

    Example::

        images, labels = fashion_mnist()  # uint8 [60000, 28, 28] and int64 [60000]
        test = fashion_mnist(train=False)  # 10,000 images that training does not see
    """
    return Dataset(*_fashion_mnist_files.load(root, train, download))


def fashion_mnist_sample(*, train: bool = True) -> Dataset:
    """Read a tenth of Fashion-MNIST, which comes with this package: real images, no download.

    It holds the first 600 training or 100 test images of each class, in the order of the full set.

    Args:
        train: 6,000 training images if true, 1,000 test images if false.

    Returns:
        `x` uint8 [n, 28, 28], 0 (background) to 255, and `y` int64 [n], the classes 0 to 9.

    Raises:
        FileNotFoundError: The installation lacks a file of the sample.
        ValueError: A file of the sample is truncated or damaged.

    Source: as `fashion_mnist`; MIT licence, Copyright (c) 2017 Zalando SE.

    >>> from fdl.data import LABELS
    >>> images, labels = fashion_mnist_sample(train=False)
    >>> images.shape, labels.bincount().tolist()
    (torch.Size([1000, 28, 28]), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    >>> LABELS[labels[0]]
    'ankle boot'
    """
    return Dataset(*_fashion_mnist_files.load_sample(train))
