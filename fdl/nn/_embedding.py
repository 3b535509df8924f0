"""The layer `embedding`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl._checks import describe
from fdl._numerics import is_visible
from fdl.nn._helpers import check_sizes, get_param
from fdl.nn._model import Model
from fdl.nn.init import Initializer, normal
from fdl.tree import Tree


def embedding(
    num_embeddings: int,
    embedding_dim: int,
    *,
    padding_idx: int | None = None,
    weight_init: Initializer | None = None,
) -> Model:
    """Replace each index by its row of a table: `[...]` to `[..., embedding_dim]`.

    Equals `torch.nn.Embedding`. The row `padding_idx` starts at 0 and is constant: no derivative
    with respect to it is taken, neither in reverse nor in forward mode.

    Args:
        num_embeddings: number of rows of the table.
        embedding_dim: size of a row.
        padding_idx: index of the row for padding; negative numbers count from the last.
        weight_init: initializer of the weight `[num_embeddings, embedding_dim]`; if None, N(0, 1).

    Raises:
        TypeError: `padding_idx` is not an int; at apply, x is not int64 or int32.
        ValueError: a size is below 1, or `padding_idx` is not the index of a row; at apply, a
            parameter has another shape.
        IndexError: at apply, x has an index that is negative or not below `num_embeddings`.

    >>> from fdl import random
    >>> layer = embedding(10, 4, padding_idx=0)
    >>> y = layer.apply(layer.init(random.key(0)), torch.tensor([[0, 3, 3]]))
    >>> y.shape, bool((y[0, 0] == 0).all()), bool((y[0, 1] == y[0, 2]).all())
    (torch.Size([1, 3, 4]), True, True)
    """
    name = f"embedding({num_embeddings}, {embedding_dim})"
    check_sizes(name, num_embeddings, embedding_dim)
    shape = (num_embeddings, embedding_dim)
    padding = None if padding_idx is None else _row(name, padding_idx, num_embeddings)

    def init(key: Tensor) -> Tree:
        weight = (weight_init or normal())(key, shape, torch.float32)
        if padding is not None:
            rows = torch.arange(num_embeddings, device=key.device)[:, None]
            weight = torch.where(rows == padding, 0, weight)
        return {"weight": weight}

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"{name}: x must hold indices, int64 or int32, got {describe(x)}; convert integers "
                "with .long()"
            )
        weight = get_param(params, "weight", shape, name)
        try:
            y = F.embedding(x, weight)
        except IndexError as error:
            values = f" with values from {x.min()} to {x.max()}" if is_visible(x) else ""
            raise IndexError(
                f"{name}: every index must be in [0, {num_embeddings}), got {describe(x)}{values}"
            ) from error
        # torch's own `padding_idx` leaves the row out of gradients, but not out of tangents.
        return y if padding is None else torch.where((x == padding)[..., None], y.detach(), y)

    return Model(init, apply, uses_key=False)


def _row(name: str, index: int, rows: int) -> int:
    if not isinstance(index, int):
        raise TypeError(f"{name}: padding_idx must be an int or None, got {describe(index)}")
    if not -rows <= index < rows:
        raise ValueError(f"{name}: padding_idx must be in [-{rows}, {rows}), got {index}")
    return index % rows
