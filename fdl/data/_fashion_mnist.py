"""Fashion-MNIST, complete or a tenth of it."""

from __future__ import annotations

import os

from fdl.data import _fashion_mnist_download
from fdl.data._types import Dataset


def fashion_mnist(
    root: str | os.PathLike[str] | None = None, *, train: bool = True, download: bool = True
) -> Dataset:
    """Read Fashion-MNIST: 28×28 grey images of clothes in ten classes (see `LABELS`).

    Searched are, in this order: `root`; `data/FashionMNIST/raw` in the working directory, where
    torchvision usually puts it; and `/usr/share/datasets/fashion-mnist`, from the Debian package
    `dataset-fashion-mnist`. If all lack it, torchvision downloads it into `root`, or `data`.

    `root` may contain the four IDX files, gzipped or not, directly or in `FashionMNIST/raw`; a
    `.npz` file with x_train, y_train, x_test and y_test; or Parquet files as Hugging Face serves
    them (`pip install 'fdl[parquet]'`). Contents are verified, so all of these give the same
    tensors or an error.

    Args:
        root: a folder with the images, or torchvision's `root`, or the `.npz` file itself.
        train: read the 60,000 training images; if false, the 10,000 test images.
        download: download the images if they are not found. If false, a `root` that contains only
            other files is an error.

    Returns:
        `x` uint8 [n, 28, 28], 0 (background) to 255, and `y` int64 [n], the classes 0 to 9.

    Raises:
        FileNotFoundError: the images were neither found nor downloaded, or `root` contains only
            other files; the error lists them, and the formats that can be read.
        ValueError: a file is damaged or contains other images; the search ends there.
        ImportError: the images are in Parquet files, and pyarrow is not installed.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747

    Example::

        images, labels = fashion_mnist()  # uint8 [60000, 28, 28] and int64 [60000]
        test = fashion_mnist(train=False)  # 10,000 images for testing
    """
    return Dataset(*_fashion_mnist_download.load(root, train, download))


def fashion_mnist_sample(*, train: bool = True) -> Dataset:
    """Read a tenth of Fashion-MNIST, which is part of this package: real images, no download.

    The sample has the first 600 training or 100 test images of each class, in their original order.

    Args:
        train: read the 6,000 training images; if false, the 1,000 test images.

    Returns:
        `x` uint8 [n, 28, 28], 0 (background) to 255, and `y` int64 [n], the classes 0 to 9.

    Raises:
        FileNotFoundError: the installation lacks a file of the sample.
        ValueError: a file of the sample is truncated or damaged.

    Source: as `fashion_mnist`; MIT licence, Copyright (c) 2017 Zalando SE.

    >>> from fdl.data import LABELS
    >>> images, labels = fashion_mnist_sample(train=False)
    >>> images.shape, labels.bincount().tolist()
    (torch.Size([1000, 28, 28]), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    >>> LABELS[labels[0]]
    'ankle boot'
    """
    return Dataset(*_fashion_mnist_download.load_sample(train))
