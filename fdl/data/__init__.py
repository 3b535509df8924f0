"""Data sets as plain tensors, and batches as rows of index arrays.

A data set stays where its tensors are. An epoch is an array of indices, and `batch` returns the
examples of one of its rows. Nothing is shuffled, copied or cached implicitly, and no dtype changes
unless you call `to_float`.

>>> from fdl import data, random
>>> images = data.fashion_mnist_sample()  # uint8
>>> indices = data.epoch_indices(random.key(0), n=6000, batch_size=100)
>>> for row in zip(*indices):
...     batch = data.to_float(data.batch(images, row))
>>> batch.x.shape, batch.x.dtype
(torch.Size([100, 1, 28, 28]), torch.float32)
"""

from __future__ import annotations

from fdl.data._augment import (
    normalize,
    random_brightness,
    random_crop,
    random_cutout,
    random_flip,
)
from fdl.data._batches import batch, batches, take, to_float
from fdl.data._fashion_mnist import fashion_mnist, fashion_mnist_sample
from fdl.data._forms import pad_to
from fdl.data._indices import bootstrap_indices, epoch_indices, sequential_indices, split
from fdl.data._mixing import cutmix, mixup
from fdl.data._poisson import poisson_indices
from fdl.data._stream import on_disk, stream
from fdl.data._synthetic import synthetic_linear
from fdl.data._table import table
from fdl.data._torchvision import from_torchvision
from fdl.data._types import LABELS, Batch, Dataset, Indices
from fdl.data._warp import random_affine, random_rotation

__all__ = [
    "LABELS",
    "Batch",
    "Dataset",
    "Indices",
    "batch",
    "batches",
    "bootstrap_indices",
    "cutmix",
    "epoch_indices",
    "fashion_mnist",
    "fashion_mnist_sample",
    "from_torchvision",
    "mixup",
    "normalize",
    "on_disk",
    "pad_to",
    "poisson_indices",
    "random_affine",
    "random_brightness",
    "random_crop",
    "random_cutout",
    "random_flip",
    "random_rotation",
    "sequential_indices",
    "split",
    "stream",
    "synthetic_linear",
    "table",
    "take",
    "to_float",
]
