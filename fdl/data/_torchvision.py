"""Data sets of torchvision as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdl._checks import describe
from fdl.data._rows import check_rows
from fdl.data._types import Dataset


def from_torchvision(dataset: Any) -> Dataset:
    """Take images and labels out of a data set of torchvision: MNIST and its kin, or CIFAR.

    These hold all images in memory, so nothing is read or decoded again. The images of EMNIST are
    transposed in its files, and so in torchvision; here they are upright.

    Args:
        dataset: a `torchvision.datasets` MNIST, FashionMNIST, KMNIST, EMNIST, QMNIST, CIFAR10 or
            CIFAR100, without transforms.

    Returns:
        `x` uint8 [n, 28, 28], or [n, 3, 32, 32] for CIFAR, and `y` int64 [n]. The classes of
        EMNIST's split "letters" count from 1, all others from 0.

    Raises:
        TypeError: `dataset` is another one; `data.stream` takes any.
        ValueError: it has transforms, which belong to the step here; or images and labels differ in
            number.

    Example::

        from torchvision import datasets

        digits = data.from_torchvision(datasets.MNIST("data", train=True, download=True))
        photos = data.from_torchvision(datasets.CIFAR100("data", train=False))
    """
    from torchvision.datasets import CIFAR10, EMNIST, MNIST

    if not isinstance(dataset, MNIST | CIFAR10):
        raise TypeError(
            "from_torchvision: dataset must be MNIST, FashionMNIST, KMNIST, EMNIST, QMNIST, "
            f"CIFAR10 or CIFAR100, got {describe(dataset)}; data.stream takes any data set of torch"
        )
    if dataset.transform is not None or dataset.target_transform is not None:
        raise ValueError(
            f"from_torchvision: {type(dataset).__name__} must have no transforms, which would not "
            "be called; change batches in the step, as by data.normalize and data.random_crop"
        )
    x, y = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets, dtype=torch.int64)
    if isinstance(dataset, CIFAR10):
        x = x.permute(0, 3, 1, 2)  # the channels come last there
    elif isinstance(dataset, EMNIST):
        x = x.mT
    if y.ndim == 2:  # QMNIST: the class, then who wrote it, and where the original is
        y = y[:, 0]
    leaves: dict[str, Tensor] = {"x": x, "y": y}
    check_rows("from_torchvision", type(dataset).__name__, leaves)
    return Dataset(x.contiguous(), y.contiguous())
