"""From a data set and indices to batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fdl.data._types import Batch


def gather(dataset: tuple[Tensor, Tensor], indices: Tensor | tuple[Tensor, Any]) -> Batch:
    """Take the examples of one step out of a data set, images as floats.

    uint8 images [n, height, width] or [n, channels, height, width] become float32 in [0, 1] with a
    channel axis, as torchvision's `ToTensor` makes them. All else keeps its dtype and shape.

    Args:
        dataset: A `Dataset`, or any pair of x [n, ...] and y [n, ...].
        indices: An index, int64 [batch], on the device of the data set; or one row of `Indices`,
            such an index and its mask, bool [batch], or [0] or () where all of them count.

    Returns:
        `x` [batch, ...], `y` [batch, ...] and the row's `mask`, () if it has none.

    Raises:
        TypeError: The index is not an int64 tensor.
        ValueError: x and y differ in length, data and index are on different devices, or the mask
            has another shape than the index.

    >>> from fdl.data import fashion_mnist_sample, sequential_indices
    >>> sample = fashion_mnist_sample(train=False)
    >>> for row in zip(*sequential_indices(len(sample.x), batch_size=300)):
    ...     batch = gather(sample, row)
    >>> batch.x.shape, batch.x.dtype, batch.mask.sum()
    (torch.Size([300, 1, 28, 28]), torch.float32, tensor(100))
    >>> gather(sample, torch.tensor([5, 7])).mask
    ()
    """
    x, y = dataset
    index, mask = _index_and_mask(indices)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"gather: dataset must have as many rows in y as in x, got {x.shape[0]} in x and "
            f"{y.shape[0]} in y"
        )
    if not x.device == y.device == index.device:
        raise ValueError(
            "gather: dataset and index must be on one device, got "
            f"x on {x.device}, y on {y.device}, index on {index.device}; move them with .to(...)"
        )
    rows = x[index]
    if x.dtype == torch.uint8 and x.ndim in (3, 4):
        rows = (rows if x.ndim == 4 else rows.unsqueeze(-3)).to(torch.float32) / 255
    return Batch(rows, y[index], mask)


def batches(
    dataset: tuple[Tensor, Tensor], indices: Tensor | tuple[Tensor, Any]
) -> Iterator[Batch]:
    """Iterate over the batches of an epoch, in a Python loop: `gather` for each step.

    Args:
        dataset: As for `gather`.
        indices: `Indices`, or an index of all steps, int64 [steps, batch].

    Raises:
        TypeError: The index is not an int64 tensor.
        ValueError: As for `gather`.

    >>> from fdl.data import sequential_indices
    >>> from fdl.data import Dataset
    >>> points = Dataset(torch.arange(5.0), torch.arange(5))
    >>> [batch.y.tolist() for batch in batches(points, sequential_indices(5, batch_size=2))]
    [[0, 1], [2, 3], [4, 0]]
    """
    rows = indices if isinstance(indices, Tensor) else zip(*indices, strict=True)
    return (gather(dataset, row) for row in rows)


def _index_and_mask(indices: Any) -> tuple[Tensor, Tensor | tuple[()]]:
    alone = isinstance(indices, Tensor)
    if not alone and not (isinstance(indices, tuple | list) and len(indices) == 2):
        raise TypeError(
            "gather: indices must be an index, int64 [batch], or a pair of one and its mask, got "
            f"{type(indices).__name__}"
        )
    index, mask = (indices, ()) if alone else indices
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"gather: the index must be int64, got {got}; cast it")
    if not isinstance(mask, Tensor) or (mask.shape[-1:] == (0,) and index.shape[-1:] != (0,)):
        return index, ()
    if mask.shape != index.shape:
        raise ValueError(
            f"gather: the mask must have the shape {list(index.shape)} of the index, got "
            f"{list(mask.shape)}"
        )
    return index, mask
