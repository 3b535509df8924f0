"""DTensors, leaves that are spread over processes: taken apart for programs, put together again."""

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


class Spread(NamedTuple):
    """How a leaf is spread: all there is of a DTensor beside this process's part of it."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size  # of the whole
    stride: tuple[int, ...]


def is_spread(leaf: Any) -> bool:
    """Say whether a leaf is a DTensor, without importing what defines them.

    >>> is_spread(torch.ones(1))
    False
    """
    tensors = sys.modules.get("torch.distributed.tensor")  # there is none before that is imported
    return tensors is not None and isinstance(leaf, tensors.DTensor)


def are_spread(kinds: Iterable[type]) -> bool:
    """Say whether DTensor is among some types.

    >>> are_spread([Tensor])
    False
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(issubclass(kind, tensors.DTensor) for kind in kinds)


def apart(leaf: Any) -> tuple[Tensor, Spread]:
    """Take a DTensor apart: this process's part of it, and how it is spread.

    Raises:
        NotImplementedError: it requires grad.
    """
    if leaf.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"jit: a DTensor of shape {list(leaf.shape)} requires grad, and backward() does not go "
            "through a jitted function of DTensors; take gradients inside, of whole parameters, as "
            "fdl.parallel.train_step does, or detach it"
        )
    part = leaf._local_tensor  # the very tensor, where to_local() may give an alias
    return part, Spread(leaf.device_mesh, tuple(leaf.placements), leaf.shape, leaf.stride())


def together(part: Tensor, how: Spread) -> Any:
    """Make a DTensor of a part: nothing is sent."""
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = how
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def gather(spread: T) -> T:
    """Give a tree whose DTensors are whole in every process."""
    return map_in_order(lambda leaf: leaf.full_tensor() if is_spread(leaf) else leaf, spread)


def map_in_order(f: Callable[..., Any], first: T, *rest: Tree) -> T:
    """Call `tree.map` in the order of sorted paths: every process sends the same leaves in turn.

    >>> map_in_order(lambda leaf: print(leaf), {"b": 1, "a": 2})
    2
    1
    {'b': None, 'a': None}
    """
    return tree.map(lambda _, leaf: leaf, first, tree.map(f, in_order(first), *rest))


def spread_as(whole: Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    """Spread a tensor that every process has: each keeps its part of it."""
    from torch.distributed.tensor import DTensor, Replicate

    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(mesh, placements)


def sum_to_shards(summand: Tensor, like: Any) -> Any:
    """Sum a tensor over the processes, each of which receives its part of the sum: as `like` is."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = like.device_mesh
    parts = DTensor.from_local(summand, mesh, [Partial("sum")] * mesh.ndim, run_check=False)
    return parts.redistribute(mesh, like.placements)


def as_before(after: T, before: Tree) -> T:
    """Spread each leaf as the one at its path was before: operations may have gathered it."""

    def settle(new: Any, old: Any) -> Any:
        if not is_spread(new):
            return spread_as(new, old.device_mesh, old.placements) if is_spread(old) else new
        if not is_spread(old):
            return new.full_tensor()
        return new.redistribute(old.device_mesh, old.placements)

    return map_in_order(settle, after, before)


@contextmanager
def replicating(leaves: Iterable[Any]) -> Iterator[None]:
    """Let plain tensors, which are the same in every process, meet DTensors, if there are any."""
    if not any(is_spread(leaf) for leaf in leaves):
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1", UserWarning)
        yield
