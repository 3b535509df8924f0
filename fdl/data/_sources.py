"""What `stream` reads from: functions of rows, data sets of torch, and iterables of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, default_collate

from fdl._checks import describe
from fdl.data._batches import take
from fdl.data._forms import batch_of
from fdl.data._rows import check_rows, check_within
from fdl.data._types import Batch, Dataset
from fdl.tree import Tree, flatten_dict

Read = Callable[[Tensor], tuple[Tree, Tree]]


def reader(source: Any) -> Read:
    """Make a function that reads rows, int64 [n] on the CPU, of any source that has rows.

    Raises:
        TypeError: the source has no rows to ask for.

    >>> reader([(1.0, 2), (3.0, 4)])
    Traceback (most recent call last):
    TypeError: stream: source must be a function from rows to (x, y), a data.Dataset, or a data \
set of torch with __getitem__ and __len__, got a list; of an iterable of batches, pass indices None
    """
    if isinstance(source, Dataset):
        return partial(take, source)
    has_rows = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    plain = isinstance(source, IterableDataset | Tensor | tuple | list | dict | str)
    if has_rows and not plain and not isinstance(source, type):
        return partial(_items, source)
    if callable(source):
        return source
    raise TypeError(
        "stream: source must be a function from rows to (x, y), a data.Dataset, or a data set of "
        f"torch with __getitem__ and __len__, got {describe(source)}; of an iterable of batches, "
        "pass indices None"
    )


def _items(dataset: Any, rows: Tensor) -> tuple[Tree, Tree]:
    """Read the items of a data set of torch, and stack them as a `DataLoader` does."""
    index, name = rows.tolist(), type(dataset).__name__
    if not index:  # leaves [0, ...] of the right shapes
        x, y = _items(dataset, torch.zeros(1, dtype=torch.int64))
        return pytree.tree_map(lambda leaf: leaf[:0], (x, y))
    check_within(f"stream: {name}", rows, len(dataset))
    many = getattr(dataset, "__getitems__", None)
    items = many(index) if many else [dataset[i] for i in index]
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"stream: items of {name} must be pairs (x, y), got {describe(item)}")
    try:
        x, y = default_collate(items)
    except (TypeError, RuntimeError) as error:  # the latter if shapes differ
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"stream: items of {name} must be tensors, arrays or numbers, of one shape, to be "
            f"stacked: {error}. Images of a folder need a transform, such as "
            "v2.Compose([v2.Resize((64, 64)), v2.PILToTensor()]) of torchvision.transforms"
        ) from error
    return x, y


def check_iterable(source: Any) -> None:
    """Raise unless the source can be an iterable of batches.

    >>> check_iterable(len)
    Traceback (most recent call last):
    TypeError: stream: without indices, source must be an iterable of batches, got the function \
len; make an order of rows, as by data.epoch_indices
    """
    has_rows = isinstance(source, Dataset | Tensor) or (
        isinstance(source, TorchDataset) and not isinstance(source, IterableDataset)
    )
    if has_rows or not isinstance(source, Iterable):
        raise TypeError(
            f"stream: without indices, source must be an iterable of batches, got "
            f"{describe(source)}; make an order of rows, as by data.epoch_indices"
        )


def stacked(batches: Iterator[Any], steps: int) -> Batch | None:
    """Stack the next batches of an iterator, at most `steps`; None if there are no more."""
    chunk = [batch_of("stream", batch) for batch in islice(batches, steps)]
    if not chunk:
        return None
    for batch in chunk:
        check_rows("stream", "a batch", flatten_dict({"x": batch.x, "y": batch.y}))
    forms = [_form(batch) for batch in chunk]
    other = next((form for form in forms if form != forms[0]), None)
    if other is not None:
        raise ValueError(
            "stream: all batches of a chunk must have the same leaves, shapes and dtypes, got\n  "
            f"{forms[0]}\n  {other}\nmake short batches longer with data.pad_to, or drop the last"
        )
    both: Batch = pytree.tree_map(lambda *leaves: torch.stack(leaves), *chunk)
    return both


def _form(batch: Batch) -> str:
    """Describe the leaves of a batch by path, dtype and shape."""
    leaves = pytree.tree_flatten_with_path(batch)[0]
    return ", ".join(f"{pytree.keystr(path)}: {describe(leaf)}" for path, leaf in leaves)
