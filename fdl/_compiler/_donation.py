"""Whose memory a jitted function may write to."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, UntypedStorage

from fdl._compiler._signature import flatten


class _Donated(Tensor):
    """What becomes of a donated tensor: any use of it raises."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise RuntimeError(
            "this tensor was donated to a jitted function (jit(..., donate_argnums=...)), which "
            "may have reused its memory: use the value that the function returned instead"
        )


def give_away(leaf: Tensor) -> None:
    """Let any later use of a tensor raise."""
    if leaf._use_count() == ALONE[0]:  # an array that shares it would lose its memory
        leaf.data = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
    leaf.__class__ = _Donated  # type: ignore[assignment]


def take_back(leaf: Tensor, kind: type[Tensor], value: Tensor) -> None:
    """Undo `give_away`, where it turned out that nothing has been written."""
    leaf.__class__ = kind  # type: ignore[assignment]
    leaf.data = value


def donated_indices(args: tuple[Any, ...], positions: tuple[int, ...]) -> list[int]:
    """Say which leaves of the arguments are given away."""
    if not all(0 <= i < len(args) for i in positions):
        raise ValueError(
            f"jit: donate_argnums={positions} must be positions of the {len(args)} arguments passed"
        )
    sizes = [len(flatten(arg)[0]) for arg in args]
    ends = list(accumulate(sizes))
    return [j for i in positions for j in range(ends[i] - sizes[i], ends[i])]


def own_memory(leaves: list[Tensor], donated: Sequence[int]) -> None:
    """Replace each donated leaf by a copy where anybody else would see a change.

    Others are views, bases, what autograd has saved, arrays of NumPy and JAX, files that are mapped
    into memory and other processes.

    Raises:
        ValueError: a donated leaf shares memory with another argument.
    """
    if not donated:
        return
    storages = [leaf.untyped_storage() for leaf in leaves]
    if len({storage._cdata for storage in storages}) < len(leaves):
        times = Counter(storage._cdata for storage in storages)
        if any(times[storages[i]._cdata] > 1 for i in donated):
            raise ValueError(
                "jit: a donated tensor is passed twice, or shares memory with another argument; it "
                "cannot be given away and kept, so clone it"
            )
    for i in donated:
        if not (
            storages[i].nbytes() == leaves[i].nbytes
            and storages[i].resizable()  # memory of others is not
            and _holders(leaves[i], storages, i) == ALONE
            and (leaves[i].is_cuda or not storages[i].is_shared())  # with other processes
        ):
            leaves[i] = leaves[i].clone()


def _holders(leaf: Tensor, storages: Sequence[UntypedStorage], i: int) -> tuple[int, int, int]:
    """Count who holds a tensor, as autograd and DLPack do, its memory, and that in Python."""
    storage_count = torch._C._storage_Use_Count(storages[i]._cdata)
    return leaf._use_count(), storage_count, sys.getrefcount(storages[i])


def _holders_of_new() -> tuple[int, int, int]:
    leaf = torch.empty(1)
    return _holders(leaf, [leaf.untyped_storage()], 0)


ALONE = _holders_of_new()


def find_homes(
    leaves: Sequence[Tensor], donated: Sequence[int], results: Sequence[Tensor]
) -> dict[int, int]:
    """Give each result the memory of a donated leaf of its form, as long as there are some."""
    free: dict[Any, list[int]] = defaultdict(list)
    for i in donated:
        free[_form(leaves[i])].append(i)
    found = {}
    for out, result in enumerate(results):
        same = free[_form(result)]
        if same:
            found[out] = same.pop(0)
    return found


def _form(leaf: Tensor) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype, leaf.device
