"""DTensors: convert them to local tensors and back, and redistribute whole trees."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fdl import tree
from fdl.tree import Tree
from fdl.tree._paths import in_order

T = TypeVar("T", bound=Tree)


class DTensorSpec(NamedTuple):
    """All that a DTensor is besides the local tensor of this process."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size  # global, as is the stride
    stride: tuple[int, ...]


def is_dtensor(leaf: Any) -> bool:
    """Check for a DTensor without importing `torch.distributed.tensor`.

    >>> is_dtensor(torch.ones(1))
    False
    """
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there are no DTensors
    return tensors is not None and isinstance(leaf, tensors.DTensor)


def any_dtensor_type(types: Iterable[type]) -> bool:
    """Check whether any of some types is DTensor.

    >>> any_dtensor_type([Tensor])
    False
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(issubclass(t, tensors.DTensor) for t in types)


def to_local(leaf: Any) -> tuple[Tensor, DTensorSpec]:
    """Return the local tensor of a DTensor, and what it takes to rebuild it: `from_local`.

    Raises:
        NotImplementedError: `leaf` requires grad.
    """
    if leaf.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"jit: a DTensor of shape {list(leaf.shape)} requires grad, but backward() through a "
            "jitted function of DTensors is not supported; take gradients inside the function, as "
            "fdl.parallel.train_step does, or detach the DTensor"
        )
    local = leaf._local_tensor  # the tensor itself; leaf.to_local() may return an alias
    return local, DTensorSpec(leaf.device_mesh, tuple(leaf.placements), leaf.shape, leaf.stride())


def from_local(local: Tensor, spec: DTensorSpec) -> Any:
    """Rebuild a DTensor from its local tensor, without communication."""
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = spec
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def gather(sharded: T) -> T:
    """Replace every DTensor of a tree by the full tensor, in every process."""
    return map_in_order(lambda leaf: leaf.full_tensor() if is_dtensor(leaf) else leaf, sharded)


def map_in_order(f: Callable[..., Any], first: T, *rest: Tree) -> T:
    """Call `tree.map` in the order of sorted paths, so that all processes communicate in one order.

    >>> map_in_order(lambda leaf: print(leaf), {"b": 1, "a": 2})
    2
    1
    {'b': None, 'a': None}
    """
    return tree.map(lambda _, leaf: leaf, first, tree.map(f, in_order(first), *rest))


def distribute(full: Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    """Make a DTensor from a tensor that every process holds in full."""
    from torch.distributed.tensor import DTensor, Replicate

    replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, placements)


def sum_to_shards(summand: Tensor, like: Any) -> Any:
    """Sum a tensor over the processes; the result is placed like the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = like.device_mesh
    partial = DTensor.from_local(summand, mesh, [Partial("sum")] * mesh.ndim, run_check=False)
    return partial.redistribute(mesh, like.placements)


def redistribute_like(after: T, before: Tree) -> T:
    """Give each leaf the placement that the leaf at its path has in `before`."""

    def place(new: Any, old: Any) -> Any:
        if not is_dtensor(new):
            return distribute(new, old.device_mesh, old.placements) if is_dtensor(old) else new
        if not is_dtensor(old):
            return new.full_tensor()
        return new.redistribute(old.device_mesh, old.placements)

    return map_in_order(place, after, before)


@contextmanager
def replicating(leaves: Iterable[Any]) -> Iterator[None]:
    """If any leaf is a DTensor, treat plain tensors as replicated where the two kinds are mixed."""
    if not any(is_dtensor(leaf) for leaf in leaves):
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1", UserWarning)
        yield
