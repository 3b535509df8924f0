"""The process group of a mesh, and calls in every process or in the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")
Mesh = Any  # torch.distributed.device_mesh.DeviceMesh, whose import takes a second


def group_of(mesh: Any | None, caller: str) -> tuple[Any, int, int]:
    """Return the process group of a mesh, the rank of this process in it, and its size."""
    if mesh is None:
        return None, 0, 1
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"parallel.{caller}: mesh must be a DeviceMesh, as torch.distributed.init_device_mesh"
            f"('cpu', (processes,)) returns, or None, got {type(mesh).__name__}"
        )
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            f"parallel.{caller}: no process group is initialised; start with torchrun, and call "
            "torch.distributed.init_process_group before you create the mesh"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"parallel.{caller}: mesh must have one dimension, got {list(mesh.shape)}; pass one of "
            "its dimensions, mesh['name']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"parallel.{caller}: this process is not part of the mesh")
    return mesh.get_group(), mesh.get_local_rank(), mesh.size()


def on_all(group: ProcessGroup | None, act: Callable[[], T]) -> list[T]:
    """Call a function in each process, and return the results of all in all of them, by rank.

    Args:
        group: the processes; None for this one alone.
        act: the function; its result is sent as a pickle, between processes of the same job.

    Raises:
        OSError: `act` raised in another process.

    >>> on_all(None, lambda: 1)
    [1]
    """
    if group is None:
        return [act()]
    result, error = None, None
    try:
        result = act()
    except Exception as raised:
        error = raised
    text = error and f"{type(error).__name__}: {error}"
    answers: list[Any] = [None] * group.size()
    dist.all_gather_object(answers, (result, text), group=group)
    if error is not None:
        raise error
    for rank, (_, elsewhere) in enumerate(answers):
        if elsewhere:
            raise OSError(f"in process {rank} of the group: {elsewhere}")
    return [result for result, _ in answers]


def on_first(group: ProcessGroup | None, act: Callable[[], T]) -> T:
    """Call a function in the first process only, and return its result in all of them.

    Args:
        group: the processes; None for this one alone.
        act: the function.

    Raises:
        OSError: `act` raised in the first process.

    >>> on_first(None, lambda: 1)
    1
    """
    first = group is None or group.rank() == 0
    return on_all(group, act if first else lambda: None)[0]  # type: ignore[arg-type, return-value]
