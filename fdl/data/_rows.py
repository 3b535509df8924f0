"""Data sets as trees of tensors with one row for each example."""

from __future__ import annotations

from torch import Tensor

from fdl.random._checks import check_key, describe
from fdl.tree import Tree, flatten_dict


def count(caller: str, key: Tensor, dataset: Tree) -> int:
    """Return the number of rows, after checking that all leaves have it, on the device of `key`."""
    check_key(caller, key)
    leaves = flatten_dict(dataset)
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            raise TypeError(
                f"{caller}: dataset must hold tensors with one row for each example, got "
                f"{describe(leaf)} at {path!r}"
            )
    lengths = {path: leaf.shape[0] for path, leaf in leaves.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"{caller}: all tensors of dataset must have the same number of rows, got "
            f"{lengths or 'no tensor'}"
        )
    devices = {str(key.device), *(str(leaf.device) for leaf in leaves.values())}
    if len(devices) > 1:
        raise ValueError(
            f"{caller}: key and dataset must be on one device, got {sorted(devices)}; "
            "move them with .to(...)"
        )
    return next(iter(lengths.values()))
