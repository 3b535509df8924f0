"""Call a function of a leaf once for many leaves, where the results are the same and come faster.

Leaf by leaf, an eager update of many small leaves spends its time in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fdl._compiler._repeated import repeated
from fdl._modes import is_eager
from fdl.optim._leaves import PLAIN, Node, NotElementwise, argument, compute
from fdl.optim._one_pass import in_one_pass
from fdl.tree import Tree
from fdl.tree._map import match
from fdl.tree._structure import flatten, unflatten

FEW = 4  # with fewer leaves, one by one is as fast
# The most elements of a batch, by device: intermediate results stay in the cache of a CPU, and take
# little of the memory of a GPU. A leaf with a quarter of that is as fast alone.
MOST = {"cpu": 2**18}
MOST_ELSEWHERE = 2**24
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

_dtype, _device = attrgetter("dtype"), attrgetter("device")
_requires_grad = attrgetter("requires_grad")


def map_leaves(f: Callable[..., Any], first: Tree, *rest: Tree, caller: str = "tree.map") -> Tree:
    """Equal `tree.map` for a pure function of tensors, which is called with many leaves at once.

    Args:
        f: function of one leaf of each tree.
        first: any tree.
        rest: further trees of the same structure.
        caller: prefix of error messages.

    >>> map_leaves(lambda p, u: p + u, {"w": torch.ones(1)}, {"w": torch.ones(1)})
    {'w': tensor([2.])}
    """
    leaves, structure = flatten(first)
    columns = [match(first, other, caller, structure) for other in rest]
    results = map_columns(lambda *row: (f(*row),), leaves, *columns)
    return unflatten(results[0] if results else [], structure)


def map_columns(
    f: Callable[..., tuple[Any, ...]], *columns: list[Any], together: bool = False
) -> list[list[Any]]:
    """Call a function of the tensors of one leaf for every leaf.

    Args:
        f: a pure function, which is passed `Leaves` for many leaves at once.
        columns: for each argument of `f`, that of every leaf: tensors or None.
        together: do not call `f` leaf by leaf because it is not elementwise.

    Returns:
        For each result of `f`, that of every leaf; an empty list if there are no leaves.

    Raises:
        NotElementwise: `together`, and `f` is not elementwise.

    >>> map_columns(lambda p, u: (p + u, p - u), [torch.ones(1)], [torch.ones(1)])
    [[tensor([2.])], [tensor([0.])]]
    """
    count = len(columns[0])
    rows: dict[int, tuple[Any, ...]] = {}
    plain = count >= FEW and _is_plain()
    computed = in_one_pass(f, columns) if plain else None
    if computed is not None:
        return computed
    for batch, wholes in _batches(columns) if plain else []:
        parts = columns if len(batch) == count else _pick(columns, batch)
        results = _together(f, parts, wholes)
        if results and parts is columns:
            return results
        if together and not results:
            raise NotElementwise(f)
        rows |= zip(batch, zip(*results, strict=True), strict=False)
    call = repeated(f)
    for i, row in enumerate(zip(*columns, strict=True)):
        if i not in rows:
            rows[i] = call(*row)
    return [list(column) for column in zip(*(rows[i] for i in range(count)), strict=True)]


def _together(
    f: Callable[..., tuple[Any, ...]], columns: Sequence[list[Tensor]], wholes: Sequence[bool]
) -> list[list[Tensor]]:
    """Call a function for a batch; return an empty list if it has to be called leaf by leaf."""
    tape: list[Node] = []
    try:
        return compute(f(*[argument(tape, *each) for each in zip(columns, wholes, strict=True)]))
    except Exception:  # an error of the function is raised again for the leaf at fault
        return []
    finally:
        tape.clear()  # a cycle would keep the tensors until the next garbage collection


def _is_plain() -> bool:
    """Return True if nothing but automatic differentiation watches or changes operations."""
    if not is_eager() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return False
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []
    return all(type(mode) is DeviceContext for mode in modes)  # that of set_default_device


Batch = tuple[Sequence[int], Sequence[bool]]  # positions of leaves; which columns are whole


def _batches(columns: Sequence[list[Any]]) -> list[Batch]:
    """Find leaves to be computed together."""
    groups: dict[Any, list[int]] = {}
    try:
        wholes = _wholes(columns)
        if wholes:
            return _small(columns[0], range(len(columns[0])), wholes)
        for i, row in enumerate(zip(*columns, strict=True)):
            if PLAIN.issuperset(map(type, row)) and row[0].ndim:
                groups.setdefault((*map(_form, row),), []).append(i)
        alike = [(group, _wholes(_pick(columns, group))) for group in groups.values()]
    except RuntimeError:  # nested tensors have no shape, and sparse ones no strides
        return []
    return [
        batch for group, wholes in alike if wholes for batch in _small(columns[0], group, wholes)
    ]


def _pick(columns: Sequence[list[Any]], positions: Sequence[int]) -> list[list[Any]]:
    return [[column[i] for i in positions] for column in columns]


def _form(x: Tensor) -> tuple[Any, ...]:
    dense = x.layout is torch.strided and x.is_contiguous() and x.stride() == _strides(x.shape)
    return x.dtype, x.device, x.requires_grad, x.ndim == 0, dense


def _wholes(columns: Sequence[list[Any]]) -> list[bool]:
    """Return for each column True for tensors of the shapes of the leaves, False for float64 `[]`.

    The list is empty if the leaves cannot be computed together.
    """
    grads, wholes = torch.is_grad_enabled(), []
    shapes: list[torch.Size] = []
    for column in columns:
        if not PLAIN.issuperset(map(type, column)) or (grads and any(map(_requires_grad, column))):
            return []
        dtypes, sizes = {*map(_dtype, column)}, [*map(Tensor.size, column)]
        shapes = shapes or sizes
        whole = sizes == shapes
        if len(dtypes) > 1 or not dtypes <= (DTYPES if whole else {torch.float64}):
            return []
        if not (whole or {*sizes} == {()}) or not all(map(Tensor.is_contiguous, column)):
            return []
        wholes.append(whole)
    first = columns[0]
    if () in shapes or len({*map(_device, first)}) > 1 or first[0].is_meta:
        return []
    # Strides of axes of length 1 may be anything in a contiguous tensor.
    if any(min(shape) < 2 for shape in {*shapes}):
        checked = [column for column, whole in zip(columns, wholes, strict=True) if whole]
        if any(x.stride() != _strides(x.shape) for column in checked for x in column):
            return []
    return wholes


@lru_cache(256)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _small(column: list[Tensor], positions: Sequence[int], wholes: list[bool]) -> list[Batch]:
    """Divide leaves into batches, without those that are large."""
    leaves = column if len(positions) == len(column) else [column[i] for i in positions]
    most = MOST.get(leaves[0].device.type, MOST_ELSEWHERE)
    sizes = [*map(Tensor.numel, leaves)]
    if sum(sizes) <= most and len(sizes) >= FEW:
        return [(positions, wholes)]
    batches: list[list[int]] = [[]]
    total = 0
    for i, size in zip(positions, sizes, strict=True):
        if size <= most // FEW:
            if total + size > most:
                batches.append([])
                total = 0
            batches[-1].append(i)
            total += size
    return [(batch, wholes) for batch in batches if len(batch) >= FEW]
