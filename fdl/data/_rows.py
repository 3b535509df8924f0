"""Data sets as trees of tensors with one row for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fdl import _checks as checks
from fdl._checks import conversion
from fdl.random._checks import check_key, describe
from fdl.tree import Tree, flatten_dict


def count(caller: str, key: Tensor, dataset: Tree) -> int:
    """Return the number of rows, after checking that all leaves have it, on the device of `key`."""
    check_key(caller, key)
    leaves = flatten_dict(dataset)
    check_rows(caller, "dataset", leaves)
    devices = {str(key.device), *(str(leaf.device) for leaf in leaves.values())}
    if len(devices) > 1:
        raise ValueError(
            f"{caller}: key and dataset must be on one device, got {sorted(devices)}; "
            "move them with .to(...)"
        )
    return next(iter(leaves.values())).shape[0]


def check_rows(caller: str, name: str, leaves: Mapping[str, Any]) -> None:
    """Raise unless all leaves are tensors with the same number of rows.

    Args:
        caller: first words of an error message.
        name: what the message calls the tree.
        leaves: the leaves of the tree by path.

    >>> import torch
    >>> check_rows("here", "dataset", {"x.0": torch.zeros(3), "x.1": torch.zeros(3, 2)})
    """
    lines = [
        f"{path or name}: {_shown(leaf)}"
        for path, leaf in leaves.items()
        if not isinstance(leaf, Tensor) or leaf.ndim == 0
    ]
    if lines:
        raise TypeError(
            f"{caller}: {name} must hold tensors [n, ...], one row for each example, got\n  "
            + "\n  ".join(lines)
        )
    lengths = {path: leaf.shape[0] for path, leaf in leaves.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"{caller}: all tensors of {name} must have the same number of rows, got "
            f"{lengths or 'no tensor'}"
        )


def check_within(caller: str, rows: Tensor, count: int) -> None:
    """Raise unless all rows are from 0 to `count` - 1.

    >>> import torch
    >>> check_within("here", torch.tensor([2, 0]), 3)
    """
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(
            f"{caller}: rows must be from 0 to {count - 1}, got {int(rows.min())} to "
            f"{int(rows.max())}"
        )


def _shown(leaf: Any) -> str:
    how = "" if isinstance(leaf, Tensor) else conversion(leaf)
    return f"{checks.describe(leaf)}; {how}" if how else describe(leaf)
