"""Trees as text: a table of the leaves, and short descriptions of dtypes, tensors and leaves."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._table import aligned
from fdl.tree._checks import check_tensors
from fdl.tree._paths import Tree, flatten_dict


def summary(tree: Tree) -> str:
    """Tabulate path, shape, dtype, count and bytes of every leaf, with totals, as aligned text.

    >>> print(summary({"fc": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}}))
    path       shape   dtype    count  bytes
    fc.weight  [2, 3]  float32      6     24
    fc.bias    [2]     float32      2      8
    total                           8     32
    """
    check_tensors(pytree.tree_leaves(tree), tree, "tree.summary: every leaf")
    rows = [
        (path, str(list(leaf.shape)), dtype_name(leaf.dtype), leaf.numel(), leaf.nbytes)
        for path, leaf in flatten_dict(tree).items()
    ]
    total = ("total", "", "", sum(row[3] for row in rows), sum(row[4] for row in rows))
    texts = [("path", "shape", "dtype", "count", "bytes")]
    texts += [(p, s, d, f"{count:,}", f"{nbytes:,}") for p, s, d, count, nbytes in [*rows, total]]
    return aligned(texts, numbers=(3, 4))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


def shape_dtype(x: Any) -> str:
    """Describe anything with a shape and a dtype of torch, without its values.

    >>> shape_dtype(torch.zeros(2, 3))
    'float32[2, 3]'
    """
    return f"{dtype_name(x.dtype)}{list(x.shape)}"


def describe_leaf(leaf: Any) -> str:
    """Describe a leaf of any type; the value only of what is not a tensor.

    >>> describe_leaf(torch.zeros(2)), describe_leaf(None)
    ('float32[2]', 'NoneType None')
    """
    return shape_dtype(leaf) if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {leaf!r}"
