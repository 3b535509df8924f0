"""What replaces operations of a loop body that `vmap` refuses, or whose derivative is wrong.

A body is traced for plain, contiguous tensors, and its in-place operations are replaced by pure
ones; then it is batched and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten


def copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The pure form of `copy_`, which has no derivative."""
    return source.to(x.device, x.dtype).expand(x.shape).clone()


def select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    """torch's gradient of a batched source is too large."""
    start = index % x.shape[dim]
    return slice_scatter(x, source.unsqueeze(dim), dim, start, start + 1)


def slice_scatter(
    x: Tensor,
    source: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    """torch's rule for `vmap` refuses the largest integer as an end, that of `x[1:] = y`.

    For complex numbers it has no derivative.
    """
    first, last, _ = slice(start, end).indices(x.shape[dim])
    if not x.is_complex():
        return torch.slice_scatter(x, source, dim, first, last, step)
    parts, new = (torch.view_as_real(z.resolve_conj()) for z in (x, source.to(x.dtype)))
    return torch.view_as_complex(torch.slice_scatter(parts, new, dim % x.ndim, first, last, step))


def as_strided(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    """A batched tensor has other strides than the traced one."""
    positions = _positions(size, stride, offset, x.device)
    return x.reshape(-1)[positions.reshape(-1)].reshape(tuple(size))


def as_strided_scatter(
    x: Tensor,
    source: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int | None = None,
) -> Tensor:
    """torch has no rule for `vmap`, and its gradient is wrong."""
    positions = _positions(size, stride, offset, x.device).reshape(-1)
    flat = torch.index_put(x.reshape(-1), (positions,), source.reshape(-1))
    return flat.reshape(x.shape)


def _positions(
    size: Sequence[int], stride: Sequence[int], offset: int | None, device: torch.device
) -> Tensor:
    """Return the place of each element in the memory of a contiguous tensor."""
    positions = torch.full((), offset or 0, dtype=torch.int64, device=device)
    for n, step in zip(size, stride, strict=True):
        positions = positions.unsqueeze(-1) + step * torch.arange(n, device=device)
    return positions


STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default)
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    aten.view.default: torch.reshape,  # batched tensors have other layouts
    aten.copy.default: copy,
    aten.select_scatter.default: select_scatter,
    aten.slice_scatter.default: slice_scatter,
    aten.as_strided.default: as_strided,
    aten.as_strided_scatter.default: as_strided_scatter,
    # Chosen because the traced tensors do not require grad.
    aten._embedding_bag_forward_only.default: aten._embedding_bag.default,
}


def has_strides_of_its_own(graph: Graph) -> bool:
    """Check for an operation whose replacement would read other elements."""
    nodes = [node for node in graph.nodes if node.target in STRIDED]
    return any(not node.args[0].meta["val"].is_contiguous() for node in nodes)
