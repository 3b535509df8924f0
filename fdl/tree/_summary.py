"""A tree as text: the table of its leaves, and a leaf in a few characters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fdl.tree._paths import Tree, flatten_dict


def summary(tree: Tree) -> str:
    """Tabulate path, shape, dtype, count and bytes of every leaf, with totals, as aligned text.

    >>> import torch
    >>> print(summary({"fc": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}}))
    path       shape   dtype    count  bytes
    fc.weight  [2, 3]  float32      6     24
    fc.bias    [2]     float32      2      8
    total                           8     32
    """
    rows = [
        (path, str(list(leaf.shape)), _dtype(leaf), leaf.numel(), leaf.nbytes)
        for path, leaf in flatten_dict(tree).items()
    ]
    total = ("total", "", "", sum(row[3] for row in rows), sum(row[4] for row in rows))
    texts = [("path", "shape", "dtype", "count", "bytes")]
    texts += [(p, s, d, f"{count:,}", f"{nbytes:,}") for p, s, d, count, nbytes in [*rows, total]]
    widths = [max(len(text[i]) for text in texts) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(text, widths, strict=True))
        )
        for text in texts
    )


def _dtype(leaf: Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _signature(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{_dtype(leaf)}{list(leaf.shape)}"
    return f"{type(leaf).__name__} {leaf!r}"
