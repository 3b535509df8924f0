"""Index arrays: shuffled, resampled, in order, or split in two."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_positive
from fdl.data import _rows
from fdl.data._batches import take
from fdl.data._types import Indices

T = TypeVar("T")


def epoch_indices(key: random.Key, n: int, batch_size: int, *, drop_last: bool = False) -> Indices:
    """Shuffle the examples 0 to n − 1 and cut them into the batches of one epoch.

    If `batch_size` does not divide n, the last batch is padded with index 0 and mask False, so that
    every step has the same shape and means over the mask are exact. Otherwise, and with
    `drop_last`, there is no mask.

    Args:
        key: the key of this epoch, `fold_in(data_key, epoch)`; the result is on its device.
        n: number of examples, at least 1.
        batch_size: examples in a batch, at least 1.
        drop_last: leave out a smaller last batch instead of padding it.

    Returns:
        `index` int64 and `mask` bool [steps, batch_size], with steps = ⌈n / batch_size⌉, or
        ⌊n / batch_size⌋ if `drop_last`; `mask` is [steps, 0] if there is no padding.

    Raises:
        TypeError: `n` or `batch_size` is not an int.
        ValueError: `n` or `batch_size` is below 1, or `drop_last` would leave no batch.

    >>> index, mask = epoch_indices(random.key(0), 5, batch_size=2)
    >>> sorted(index[mask].tolist())
    [0, 1, 2, 3, 4]
    >>> mask.tolist()
    [[True, True], [True, True], [True, False]]
    """
    check_positive("epoch_indices", "n", n)
    check_positive("epoch_indices", "batch_size", batch_size)
    if drop_last and batch_size > n:
        raise ValueError(
            f"epoch_indices: batch_size must be at most n={n} with drop_last=True, got "
            f"{batch_size}, which leaves no batch; use a smaller one or drop_last=False"
        )
    order = random.permutation(key, n)
    return _in_batches(order[: n - n % batch_size] if drop_last else order, batch_size)


def bootstrap_indices(key: random.Key, n: int, batch_size: int) -> Indices:
    """Draw n of the examples 0 to n − 1 with replacement, and cut them into batches.

    About 63 % of the examples are drawn, some of them several times. For bagging, give each member
    of a population a key of its own, and use it in every epoch.

    Args:
        key: the key of this sample; the result is on its device.
        n: number of examples, at least 1.
        batch_size: examples in a batch, at least 1; the last batch is padded with index 0 and mask
            False.

    Returns:
        `index` int64 and `mask` bool [⌈n / batch_size⌉, batch_size]; `mask` is [steps, 0] if
        `batch_size` divides n.

    Raises:
        TypeError: `n` or `batch_size` is not an int.
        ValueError: `n` or `batch_size` is below 1.

    Source: Breiman, Bagging predictors, Machine Learning 24, 1996.

    >>> index, mask = bootstrap_indices(random.key(0), 1000, batch_size=100)
    >>> index.shape, len(index.unique())
    (torch.Size([10, 100]), 639)
    """
    check_positive("bootstrap_indices", "n", n)
    check_positive("bootstrap_indices", "batch_size", batch_size)
    return _in_batches(random.randint(key, (n,), minval=0, maxval=n), batch_size)


def sequential_indices(
    n: int, batch_size: int, *, device: torch.device | str | None = None
) -> Indices:
    """Cut the examples 0 to n − 1 into batches in order, for evaluation.

    Args:
        n: number of examples, at least 1.
        batch_size: examples in a batch, at least 1; the last batch is padded with index 0 and mask
            False.
        device: device of the result; torch's default device if None.

    Returns:
        `index` int64 and `mask` bool [⌈n / batch_size⌉, batch_size]; `mask` is [steps, 0] if
        `batch_size` divides n.

    Raises:
        TypeError: `n` or `batch_size` is not an int.
        ValueError: `n` or `batch_size` is below 1.

    >>> sequential_indices(3, batch_size=2).index.tolist()
    [[0, 1], [2, 0]]
    """
    check_positive("sequential_indices", "n", n)
    check_positive("sequential_indices", "batch_size", batch_size)
    return _in_batches(torch.arange(n, device=device), batch_size)


def split(key: random.Key, dataset: T, fraction: float) -> tuple[T, T]:
    """Split a data set at random into two parts, such as one for training and one for validation.

    The second part has the examples `random.permutation(key, n)[:round(fraction * n)]`, the first
    part has all others.

    Args:
        key: a key, on the device of the data set.
        dataset: a `Dataset`, or any tree of tensors [n, ...] with one row for each example.
        fraction: share of the second part, between 0 and 1; neither part may be empty.

    Returns:
        Two trees of the structure of `dataset`; their leaves are copies.

    Raises:
        TypeError: `dataset` has leaves that are not tensors, or `fraction` is not a float.
        ValueError: the tensors differ in length or device, or a part would be empty.

    >>> from fdl.data import fashion_mnist_sample
    >>> train, validation = split(random.key(0), fashion_mnist_sample(), 0.1)
    >>> train.x.shape, validation.x.shape
    (torch.Size([5400, 28, 28]), torch.Size([600, 28, 28]))
    """
    n = _rows.count("split", key, dataset)
    if not isinstance(fraction, float):
        raise TypeError(f"split: fraction must be a float between 0 and 1, got {fraction!r}")
    held_out = round(fraction * n) if 0 < fraction < 1 else 0
    if not 0 < held_out < n:
        raise ValueError(
            f"split: fraction must leave at least one of the {n} examples in each part, "
            f"got {fraction}"
        )
    second, first = random.permutation(key, n).tensor_split([held_out])
    return take(dataset, first), take(dataset, second)


def _in_batches(order: Tensor, batch_size: int) -> Indices:
    n = order.shape[0]
    steps = -(-n // batch_size)
    padding = torch.zeros(steps * batch_size - n, dtype=order.dtype, device=order.device)
    index = torch.cat([order, padding])
    # Compared with zeros_like(index), which has the axes of vmap: torch 2.11's vmap fails on
    # results without them.
    mask = torch.arange(n - len(index), n, device=order.device).flip(0) >= torch.zeros_like(index)
    width = batch_size if len(padding) else 0
    return Indices(
        index.reshape(steps, batch_size), mask.reshape(steps, batch_size)[:, :width].contiguous()
    )
