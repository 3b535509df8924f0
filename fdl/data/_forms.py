"""The forms in which a batch may be passed, and `pad_to`, which makes its length constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._checks import check_positive, conversion, describe
from fdl.data._rows import check_rows
from fdl.data._types import Batch
from fdl.tree import flatten_dict


def batch_of(caller: str, batch: Any) -> Batch:
    """Return a batch of any form as a `Batch`.

    Args:
        caller: first words of an error message.
        batch: a `Batch`, a tuple or list (x, y) or (x, y, mask), or a dict with these names.

    Raises:
        TypeError: `batch` is none of these, or contains arrays that are not tensors.

    >>> batch_of("here", {"x": torch.zeros(2), "y": torch.ones(2)})
    Batch(x=tensor([0., 0.]), y=tensor([1., 1.]), mask=())
    """
    names = set(batch) if isinstance(batch, Mapping) else None
    if names in ({"x", "y"}, {"x", "y", "mask"}):
        batch = Batch(**batch)
    elif names is None and isinstance(batch, tuple | list) and len(batch) in (2, 3):
        batch = Batch(batch[0], batch[1], batch[2] if len(batch) == 3 else ())
    else:
        got = f"the entries {list(batch)}" if names is not None else describe(batch)
        raise TypeError(
            f"{caller}: batch must be Batch(x, y), Batch(x, y, mask), a tuple of these or a dict "
            f"with the entries x, y and mask, got {got}"
        )
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        how = "" if isinstance(leaf, Tensor) else conversion(leaf)
        if how:
            raise TypeError(
                f"{caller}: batch{pytree.keystr(path)} must be a tensor, got {describe(leaf)}; "
                f"{how}"
            )
    return batch


def pad_to(batch: Any, size: int) -> Batch:
    """Pad a batch to `size` rows, with a mask, so that a jitted step has one shape and one program.

    Call it on every batch of a loader, for it gives a full one a mask as well. A padded row is a
    copy of the first, zeros if there is none; the mask leaves it out of every loss, metric and
    statistic. (`epoch_indices` and its like pad by themselves.)

    Args:
        batch: a `Batch`, a tuple or list (x, y) or (x, y, mask), or a dict with these names; leaves
            of x and y are [n, ...].
        size: the number of rows of the result, at least n.

    Returns:
        The batch with leaves [size, ...], dtypes unchanged, and the mask: bool [size], False where
        a row is padding; or the mask of `batch`, of its dtype, followed by zeros.

    Raises:
        TypeError: `batch` has another form, or leaves that are not tensors with rows; `size` is not
            an int.
        ValueError: the batch is longer than `size`, its leaves differ in length (each is listed by
            its path), or its mask is not [n].

    >>> pad_to((torch.tensor([3.0, 4.0]), torch.tensor([0, 1])), 3)
    Batch(x=tensor([3., 4., 3.]), y=tensor([0, 1, 0]), mask=tensor([ True,  True, False]))
    """
    check_positive("pad_to", "size", size)
    x, y, mask = batch_of("pad_to", batch)
    leaves = flatten_dict({"x": x, "y": y})
    check_rows("pad_to", "batch", leaves)
    first = next(iter(leaves.values()))
    n = first.shape[0]
    if n > size:
        raise ValueError(f"pad_to: the batch has {n} rows, more than size={size}")
    if not isinstance(mask, Tensor):
        mask = torch.ones(n, dtype=torch.bool, device=first.device)
    elif mask.shape != (n,):
        raise ValueError(f"pad_to: mask must have the shape [{n}], got {list(mask.shape)}")
    x, y = pytree.tree_map(lambda leaf: _padded(leaf, leaf[:1], size), (x, y))
    return Batch(x, y, _padded(mask, mask[:0], size))


def _padded(leaf: Tensor, row: Tensor, size: int) -> Tensor:
    """Append copies of a row, zeros if it is empty."""
    shape = (size - leaf.shape[0], *leaf.shape[1:])
    return torch.cat([leaf, row.expand(shape) if row.shape[0] else leaf.new_zeros(shape)])
