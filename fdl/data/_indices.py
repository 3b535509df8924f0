"""The order of examples: which of them are in which batch."""

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

    Where `batch_size` does not divide n, the last batch is filled up with index 0 and mask False:
    means over the mask are then exact, and every step has the same shape. Where it does, or with
    `drop_last`, there is no mask.

    Args:
        key: The key of this epoch, `fold_in(data_key, epoch)`; the result is on its device.
        n: How many examples there are, at least 1.
        batch_size: Examples in a batch, at least 1.
        drop_last: Leave out the smaller last batch instead of filling it up.

    Returns:
        `index` int64 and `mask` bool [steps, batch_size], with steps = ⌈n / batch_size⌉, or
        ⌊n / batch_size⌋ if `drop_last`; `mask` is [steps, 0] where nothing is filled up.

    Raises:
        TypeError: `n` or `batch_size` is no int.
        ValueError: `n` or `batch_size` is below 1, or `drop_last` would leave no batch at all.

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
            f"{batch_size}: no batch would be left; use a smaller one or drop_last=False"
        )
    order = random.permutation(key, n)
    return _in_batches(order[: n - n % batch_size] if drop_last else order, batch_size)


def bootstrap_indices(key: random.Key, n: int, batch_size: int) -> Indices:
    """Draw n of the examples 0 to n − 1, with replacement, and cut them into batches.

    About 63 % of the examples are among them, some several times. One key draws one sample: for
    bagging every member of a population keeps its own (Breiman, 1996).

    Args:
        key: The key of this sample; the result is on its device.
        n: How many examples there are, at least 1.
        batch_size: Examples in a batch, at least 1; the last batch is filled up with index 0 and
            mask False.

    Returns:
        `index` int64 and `mask` bool [⌈n / batch_size⌉, batch_size]; `mask` is [steps, 0] where
        `batch_size` divides n.

    Raises:
        TypeError: `n` or `batch_size` is no int.
        ValueError: `n` or `batch_size` is below 1.

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
    """Cut the examples 0 to n − 1 into batches in their own order, for evaluation.

    Args:
        n: How many examples there are, at least 1.
        batch_size: Examples in a batch, at least 1; the last batch is filled up with index 0 and
            mask False.
        device: Where the result is to be; torch's default device if None.

    Returns:
        `index` int64 and `mask` bool [⌈n / batch_size⌉, batch_size]; `mask` is [steps, 0] where
        `batch_size` divides n.

    Raises:
        TypeError: `n` or `batch_size` is no int.
        ValueError: `n` or `batch_size` is below 1.

    >>> sequential_indices(3, batch_size=2).index.tolist()
    [[0, 1], [2, 0]]
    """
    check_positive("sequential_indices", "n", n)
    check_positive("sequential_indices", "batch_size", batch_size)
    return _in_batches(torch.arange(n, device=device), batch_size)


def split(key: random.Key, dataset: T, fraction: float) -> tuple[T, T]:
    """Split a data set at random into two, to train on the first and to validate on the second.

    Each example is in exactly one of them. The second holds the first round(fraction · n) entries
    of `random.permutation(key, n)`, the first holds the others.

    Args:
        key: A key, on the device of the data set.
        dataset: A `Dataset`, or any tree of tensors [n, ...] with one row for each example.
        fraction: The share of the second, between 0 and 1; rounding must leave no part empty.

    Returns:
        Two trees of the structure of `dataset`; they are copies.

    Raises:
        TypeError: `dataset` holds something other than tensors, or `fraction` is not a float.
        ValueError: The tensors differ in length or device, or a part would be empty.

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
    # Compared with zeros like the index, which have its axes under vmap: torch 2.11's vmap fails
    # on results that have none of them.
    mask = torch.arange(n - len(index), n, device=order.device).flip(0) >= torch.zeros_like(index)
    width = batch_size if len(padding) else 0
    return Indices(
        index.reshape(steps, batch_size), mask.reshape(steps, batch_size)[:, :width].contiguous()
    )
