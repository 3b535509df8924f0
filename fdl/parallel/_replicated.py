"""Check that all processes have the same state."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl.parallel._group import Mesh, group_of
from fdl.tree import Tree
from fdl.tree._summary import shape_dtype


def check_replicated(state: Tree, mesh: Mesh | None) -> None:
    """Compare a tree between all processes, and raise in each of them if any leaf differs.

    Call it once before training: if one process starts from another key or file, nothing else
    would reveal it.

    Args:
        state: the tree that should be the same in every process: a `TrainState`, numbers, strings.
        mesh: the processes, a `DeviceMesh` of one dimension; None for this process alone.

    Raises:
        ValueError: the trees differ; each path is listed, with the leaves of two processes.

    Example::

        parallel.check_replicated({"state": state, "lr": 0.1, "batch": 256}, mesh)
    """
    group, rank, size = group_of(mesh, "check_replicated")
    if group is None:
        return
    mine = {path: _shown(leaf) for path, leaf in tree.flatten_dict(state).items()}
    gathered: list[Any] = [None] * size
    torch.distributed.all_gather_object(gathered, mine, group)
    lines = [
        f"{path}: " + ", ".join(f"{has.get(path, 'missing')} on rank {r}" for r, has in who)
        for path in dict.fromkeys(path for has in gathered for path in has)
        if (who := _unequal([has.get(path) for has in gathered], gathered))
    ]
    if lines:
        raise ValueError(
            f"parallel.check_replicated: processes have different states (this is rank {rank}); "
            "create it from the same key, file and options in each:\n  " + "\n  ".join(lines)
        )


def _unequal(values: list[Any], gathered: list[Any]) -> list[tuple[int, Any]]:
    """Return the first process and the first that differs from it, with their leaves."""
    other = next((r for r, value in enumerate(values) if value != values[0]), None)
    return [] if other is None else [(0, gathered[0]), (other, gathered[other])]


def _shown(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:8]
    return f"{shape_dtype(leaf)} with SHA-256 {digest}"
