"""Which rows of a batch a process takes."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl import tree
from fdl.parallel._group import Mesh, T, group_of


def own_rows(indices: T, mesh: Mesh | None) -> T:
    """Take this process's columns of `[steps, batch]`, or of any leaves with those two axes first.

    Rank r of N has columns r·batch/N to (r + 1)·batch/N: what all have together is the whole.

    Args:
        indices: leaves [steps, batch, …], such as those of `data.epoch_indices`.
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone.

    Returns:
        Leaves [steps, batch / N, …].

    Raises:
        ValueError: the batch is not divisible by the number of processes.

    Example::

        rows = parallel.own_rows(data.epoch_indices(random.key(1), 60_000, 256), mesh)
    """
    _, rank, size = group_of(mesh, "own_rows")

    def part(path: str, leaf: Tensor) -> Tensor:
        if leaf.ndim < 2 or leaf.shape[1] % size:
            raise ValueError(
                f"parallel.own_rows: {path or 'indices'} has the shape {list(leaf.shape)}; "
                f"expected [steps, batch, ...] with a batch divisible by {size} processes"
            )
        own = leaf.chunk(size, dim=1)[rank]
        return own if size == 1 else own.clone(memory_format=torch.contiguous_format)

    flat = tree.flatten_dict(indices)
    parts = {path: part(path, leaf) for path, leaf in flat.items()}
    return tree.unflatten_dict(parts, like=indices)
