"""Rows of data sets: `take`, batches for one step or an epoch, and images as floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._checks import as_tuple
from fdl._checks import describe as describe_type
from fdl.data._rows import check_rows
from fdl.data._types import Batch, Dataset
from fdl.random._checks import describe
from fdl.tree import Tree, flatten_dict, unflatten_dict

T = TypeVar("T", bound=Tree)
Images = TypeVar("Images", Tensor, Batch, Dataset)


def take(tree: T, index: int | Tensor) -> T:
    """Return the rows `leaf[index]` of every leaf.

    Args:
        tree: tensors [n, ...]: a `Dataset`, `Indices` (rows are steps), or any other tree.
        index: an int, or int64 of any shape, on the device of the leaves.

    Returns:
        The same structure and dtypes, leaves [*index.shape, ...].

    Raises:
        TypeError: the index is neither an int nor int64, or a leaf is not a tensor with rows.
        ValueError: leaves differ in length, or leaves and index are on different devices.

    >>> take({"x": torch.tensor([[1, 2], [3, 4]]), "y": torch.tensor([5, 6])}, 1)
    {'x': tensor([3, 4]), 'y': tensor(6)}
    >>> take(torch.tensor([5, 6, 7]), torch.tensor([2, 2]))
    tensor([7, 7])
    """
    if not isinstance(index, int) or isinstance(index, bool):
        _check_index("take", index)
    leaves = flatten_dict(tree)
    check_rows("take", "tree", leaves)
    if isinstance(index, Tensor):
        devices = {str(leaf.device) for leaf in leaves.values()}
        if devices - {str(index.device)}:
            raise ValueError(
                f"take: tree and index must be on one device, got {sorted(devices)} and "
                f"{index.device}; move them with .to(...)"
            )
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def batch(dataset: tuple[Tree, Tree], row: Tensor | tuple[Tensor, Any]) -> Batch:
    """Return the examples of one step, dtypes unchanged; see `to_float` for images.

    Args:
        dataset: a `Dataset`, or any pair of x and y: tensors [n, ...] or trees of them.
        row: an index, int64 [batch], on the device of the data set; or one row of `Indices`, which
            is such an index and its mask, bool [batch] ([0] or () if every example counts).

    Returns:
        `x` and `y`, leaves [batch, ...], and the `mask` of the row, () if it has none.

    Raises:
        TypeError: the data set is not a pair, the index is not an int64 tensor, or a leaf is not a
            tensor with rows.
        ValueError: leaves differ in length (each is listed by its path), data and index are on
            different devices, or the mask has another shape than the index.

    >>> from fdl.data import sequential_indices
    >>> points = Dataset(torch.arange(5.0), torch.arange(5))
    >>> for row in zip(*sequential_indices(5, batch_size=3)):
    ...     print(batch(points, row).y, batch(points, row).mask)
    tensor([0, 1, 2]) tensor([True, True, True])
    tensor([3, 4, 0]) tensor([ True,  True, False])
    >>> pairs = Dataset({"left": points.x, "right": -points.x}, points.y)
    >>> batch(pairs, torch.tensor([4, 2]))
    Batch(x={'left': tensor([4., 2.]), 'right': tensor([-4., -2.])}, y=tensor([4, 2]), mask=())
    """
    if not isinstance(dataset, tuple | list) or len(dataset) != 2:
        raise TypeError(
            f"batch: dataset must be a Dataset or a pair of x and y, got {_parts(dataset)}"
        )
    x, y = dataset
    index, mask = index_and_mask(row)
    plain = isinstance(x, Tensor) and isinstance(y, Tensor)  # the usual case, made fast
    leaves = {"x": x, "y": y} if plain else flatten_dict({"x": x, "y": y})
    check_rows("batch", "dataset", leaves)
    if any(leaf.device != index.device for leaf in leaves.values()):
        where = [f"{path} on {leaf.device}" for path, leaf in leaves.items()]
        raise ValueError(
            "batch: dataset and index must be on one device, got "
            f"{', '.join(where)}, index on {index.device}; move them with .to(...)"
        )
    if plain:
        return Batch(x[index], y[index], mask)
    x, y = pytree.tree_map(lambda leaf: leaf[index], (x, y))
    return Batch(x, y, mask)


def batches(dataset: tuple[Tree, Tree], indices: Tensor | tuple[Tensor, Any]) -> Iterator[Batch]:
    """Iterate over the batches of an epoch in a Python loop: `batch` for each step.

    Args:
        dataset: as for `batch`.
        indices: `Indices`, or an index of all steps, int64 [steps, batch].

    Raises:
        TypeError: as for `batch`.
        ValueError: as for `batch`.

    >>> from fdl.data import sequential_indices
    >>> points = Dataset(torch.arange(5.0), torch.arange(5))
    >>> [batch.y.tolist() for batch in batches(points, sequential_indices(5, batch_size=2))]
    [[0, 1], [2, 3], [4, 0]]
    """
    what = "Indices, or an int64 tensor [steps, batch]"
    is_plain = isinstance(indices, Tensor)
    rows = indices if is_plain else zip(*as_tuple("batches", "indices", indices, what), strict=True)
    return (batch(dataset, row) for row in rows)


def to_float(x: Images) -> Images:
    """Convert uint8 images to float32 in [0, 1] with a channel axis, as torchvision's `ToTensor`.

    Args:
        x: uint8 [n, height, width] or [n, channels, height, width], or a `Batch` or `Dataset` with
            such an `x`. Floating tensors are returned as they are. If the `x` of a `Batch` or
            `Dataset` is a tree of several tensors, its uint8 leaves are converted, and the others,
            such as tokens or masks, are returned as they are.

    Returns:
        float32 [n, channels, height, width], or the `Batch` or `Dataset` with this `x`.

    Raises:
        TypeError: a single tensor that is neither uint8 nor floating, or no tensor.
        ValueError: uint8 of another shape.

    >>> to_float(torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8))
    tensor([[[[0.0000, 0.2000],
              [0.4000, 1.0000]]]])
    >>> from fdl.data import fashion_mnist_sample
    >>> sample = fashion_mnist_sample(train=False)
    >>> to_float(batch(sample, torch.tensor([5, 7]))).x.shape
    torch.Size([2, 1, 28, 28])
    """
    if isinstance(x, (Batch, Dataset)):
        inputs = _images("x", x.x) if isinstance(x.x, Tensor) else _images_of(x.x)
        return type(x)(inputs, *x[1:])  # not `_replace`, which Dynamo of torch 2.11 cannot
    return _images("x", x)


def _images_of(x: Tree) -> Tree:
    """Convert the uint8 leaves of a tree."""
    leaves = {
        path: _images(path, leaf) if getattr(leaf, "dtype", torch.uint8) == torch.uint8 else leaf
        for path, leaf in flatten_dict({"x": x}).items()
    }
    return unflatten_dict(leaves, like={"x": x})["x"]


def _images(name: str, x: Any) -> Tensor:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    images = "uint8 images [n, height, width] or [n, channels, height, width]"
    expected = f"to_float: {name} must be floating, or {images}"
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        hint = "; make a pair a data.Dataset(x, y)" if isinstance(x, tuple | list) else ""
        raise TypeError(f"{expected}, got {describe_type(x)}{hint}")
    if x.ndim not in (3, 4):
        raise ValueError(f"{expected}, got {describe(x)}")
    return (x if x.ndim == 4 else x.unsqueeze(-3)).to(torch.float32) / 255


def _parts(x: Any) -> str:
    return f"{len(x)} parts" if isinstance(x, tuple | list) else describe_type(x)


def index_and_mask(row: Any, caller: str = "batch") -> tuple[Tensor, Tensor | tuple[()]]:
    """Return the index and the mask of `Indices`, of a row of them or of an index alone.

    >>> index_and_mask(torch.tensor([4, 2]))
    (tensor([4, 2]), ())
    """
    name = "row" if caller == "batch" else "indices"
    if isinstance(row, Tensor):
        index, mask = row, ()
    elif isinstance(row, tuple | list) and len(row) == 2:
        index, mask = row
    else:
        raise TypeError(
            f"{caller}: {name} must be an index, int64 [batch], or a pair of an index and its mask,"
            f" got {type(row).__name__}"
        )
    _check_index(caller, index)
    if not isinstance(mask, Tensor) or (mask.shape[-1:] == (0,) and index.shape[-1:] != (0,)):
        return index, ()
    if mask.shape != index.shape:
        raise ValueError(
            f"{caller}: the mask must have the shape {list(index.shape)} of the index, got "
            f"{list(mask.shape)}"
        )
    return index, mask


def _check_index(caller: str, index: Any) -> None:
    if not isinstance(index, Tensor):
        got = describe_type(index)
        raise TypeError(f"{caller}: the index must be an int64 tensor, got {got}")
    if index.dtype != torch.int64:
        raise TypeError(f"{caller}: the index must be int64, got {index.dtype}; cast it")
