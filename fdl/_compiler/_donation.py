"""Donation: which memory of the arguments a jitted function may reuse for its results."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, UntypedStorage

from fdl._compiler._signature import flatten


class Donated(Tensor):
    """The class that a donated tensor gets: any use of it raises."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise RuntimeError(
            "this tensor was donated to a jitted function (jit(..., donate_argnums=...)), which "
            "may have reused its memory: use the value that the function returned instead"
        )


def invalidate(leaf: Tensor) -> None:
    """Make any later use of a tensor raise."""
    if leaf._use_count() == ALONE[0]:  # else an array that shares its memory would lose it
        leaf.data = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
    leaf.__class__ = Donated  # type: ignore[assignment]


def revalidate(leaf: Tensor, tensor_type: type[Tensor], value: Tensor) -> None:
    """Undo `invalidate`, if nothing has been written."""
    leaf.__class__ = tensor_type  # type: ignore[assignment]
    leaf.data = value


def as_positions(donate_argnums: Any) -> tuple[int, ...]:
    """Return `donate_argnums` as a tuple, or raise a TypeError."""
    single = isinstance(donate_argnums, int)
    positions = (donate_argnums,) if single else donate_argnums
    if isinstance(positions, Sequence) and all(isinstance(i, int) for i in positions):
        return tuple(positions)
    raise TypeError(
        f"jit: donate_argnums must be a position or a sequence of positions, got {donate_argnums!r}"
    )


def donated_indices(args: tuple[Any, ...], argnums: tuple[int, ...]) -> list[int]:
    """Return the indices of the donated leaves among the leaves of all arguments."""
    if not all(0 <= i < len(args) for i in argnums):
        raise ValueError(
            f"jit: donate_argnums={argnums} must be positions of the {len(args)} arguments passed"
        )
    sizes = [len(flatten(arg)[0]) for arg in args]
    ends = list(accumulate(sizes))
    return [j for i in argnums for j in range(ends[i] - sizes[i], ends[i])]


def copy_if_shared(leaves: list[Tensor], donated: Sequence[int]) -> None:
    """Replace each donated leaf by a copy if its memory is visible elsewhere.

    It may be shared with views or a base, autograd's saved tensors, arrays of NumPy and JAX,
    memory-mapped files and other processes, or by elements of the leaf.

    Raises:
        ValueError: a donated leaf shares memory with another argument.
    """
    if not donated:
        return
    storages = [leaf.untyped_storage() for leaf in leaves]
    if len({storage._cdata for storage in storages}) < len(leaves):
        uses = Counter(storage._cdata for storage in storages)
        if any(uses[storages[i]._cdata] > 1 for i in donated):
            raise ValueError(
                "jit: a donated tensor is passed twice, or shares memory with another argument, "
                "which would be overwritten; clone it"
            )
    for i in donated:
        if not (
            storages[i].nbytes() == leaves[i].nbytes
            and storages[i].resizable()  # borrowed memory is not
            and _holders(leaves[i], storages, i) == ALONE
            and (leaves[i].is_cuda or not storages[i].is_shared())  # with other processes
            and not torch._debug_has_internal_overlap(leaves[i])  # 0: each element has its own
        ):
            leaves[i] = leaves[i].clone()


def _holders(leaf: Tensor, storages: Sequence[UntypedStorage], i: int) -> tuple[int, int, int]:
    """Count references to a tensor (autograd, DLPack), its storage, and the latter in Python."""
    storage_count = torch._C._storage_Use_Count(storages[i]._cdata)
    return leaf._use_count(), storage_count, sys.getrefcount(storages[i])


def _holders_of_new() -> tuple[int, int, int]:
    leaf = torch.empty(1)
    return _holders(leaf, [leaf.untyped_storage()], 0)


ALONE = _holders_of_new()


def match_buffers(
    leaves: Sequence[Tensor], donated: Sequence[int], results: Sequence[Tensor | None]
) -> dict[int, int]:
    """Map results to donated leaves of the same shape, dtype and device, each used once.

    Args:
        leaves: the arguments.
        donated: indices of those that are donated.
        results: the results; None for one that needs memory of its own.

    Returns:
        The index of a leaf for the index of each result that is written into its memory.
    """
    free: dict[Any, list[int]] = defaultdict(list)
    for i in donated:
        free[_buffer_kind(leaves[i])].append(i)
    aliases = {}
    for out, result in enumerate(results):
        candidates = free[_buffer_kind(result)] if result is not None else []
        if candidates:
            aliases[out] = candidates.pop(0)
    return aliases


def _buffer_kind(leaf: Tensor) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype, leaf.device
