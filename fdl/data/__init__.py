"""Data sets as plain tensors, and batches as rows of index arrays.

A data set stays where its tensors are; an epoch is an array of indices, and `gather` takes one row
of it to a batch. Nothing is shuffled, copied or cached behind the caller's back.
"""

from __future__ import annotations

from fdl.data._batches import batches, gather
from fdl.data._fashion_mnist import fashion_mnist, fashion_mnist_sample
from fdl.data._indices import bootstrap_indices, epoch_indices, sequential_indices, split
from fdl.data._synthetic import synthetic_linear
from fdl.data._types import LABELS, Batch, Dataset, Indices

__all__ = [
    "LABELS",
    "Batch",
    "Dataset",
    "Indices",
    "batches",
    "bootstrap_indices",
    "epoch_indices",
    "fashion_mnist",
    "fashion_mnist_sample",
    "gather",
    "sequential_indices",
    "split",
    "synthetic_linear",
]
