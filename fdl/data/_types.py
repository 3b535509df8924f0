"""The types of data sets, batches and indices."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fdl._kinds import register
from fdl.tree import Tree

LABELS = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@register
class Dataset(NamedTuple):
    """Examples, all in memory: row i of `x` belongs to row i of `y`.

    Each is a tensor, or a tree of tensors with the same number of rows: a model with several inputs
    gets the tree x as its one argument.

    >>> import torch
    >>> x, y = Dataset(torch.zeros(5, 2), torch.arange(5))
    >>> texts = Dataset({"tokens": torch.zeros(5, 9).long(), "lengths": torch.ones(5)}, y)
    """

    x: Tree  # leaves [n, ...]: features, images, tokens
    y: Tree  # leaves [n, ...]: targets; () if there are none


@register
class Batch(NamedTuple):
    """The examples of one training step, and a mask of those that count.

    >>> import torch
    >>> Batch(torch.zeros(3, 2), torch.zeros(3)).mask
    ()
    """

    x: Tree  # leaves [batch, ...]
    y: Tree  # leaves [batch, ...]
    mask: Tensor | tuple[()] = ()  # bool [batch], False where a row is padding; () if all count


@register
class Indices(NamedTuple):
    """The rows of a data set for each step of an epoch; `scan` and `zip(*indices)` iterate over it.

    If there is no padding, the mask has width 0, and `batch` returns batches without one: models
    are faster without a mask, and some do not accept any.

    >>> from fdl.data import sequential_indices
    >>> for index, mask in zip(*sequential_indices(3, batch_size=2)):
    ...     print(index.tolist(), mask.tolist())
    [0, 1] [True, True]
    [2, 0] [True, False]
    """

    index: Tensor  # type: ignore[assignment]  # int64 [steps, batch], rows of a data set
    mask: Tensor  # bool [steps, batch], False where `index` is padding; [steps, 0] without any
