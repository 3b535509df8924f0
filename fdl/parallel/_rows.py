"""The rows of a batch for each process."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl import tree
from fdl.parallel._group import Mesh, T, group_of


def own_rows(indices: T, mesh: Mesh | None) -> T:
    """Return this process's part of every batch: of `Indices`, or any leaves [steps, batch, ...].

    Rank r of N gets columns r·batch/N to (r + 1)·batch/N.

    Args:
        indices: leaves [steps, batch, ...], such as those of `data.epoch_indices`.
        mesh: the processes, a `DeviceMesh` of one dimension; None for this process alone.

    Returns:
        The same structure, leaves [steps, batch / N, ...].

    Raises:
        ValueError: the batch is not divisible by the number of processes (each leaf is listed).

    Example::

        rows = parallel.own_rows(data.epoch_indices(random.key(1), 60_000, 256), mesh)
    """
    _, rank, size = group_of(mesh, "own_rows")

    lines = [
        f"{path or 'indices'}: {list(leaf.shape)}"
        for path, leaf in tree.flatten_dict(indices).items()
        if leaf.ndim < 2 or leaf.shape[1] % size
    ]
    if lines:
        raise ValueError(
            "parallel.own_rows: expected leaves [steps, batch, ...] with a batch divisible by the "
            f"{size} processes, got\n  " + "\n  ".join(lines)
        )

    def own(leaf: Tensor) -> Tensor:
        columns = leaf.chunk(size, dim=1)[rank]
        return columns if size == 1 else columns.clone(memory_format=torch.contiguous_format)

    return tree.map(own, indices)
