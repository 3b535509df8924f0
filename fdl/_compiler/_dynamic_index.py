"""Indices that are tensors, in a traced function: `x[i]`, `x[i:i + 2]`, `torch.narrow(x, 0, i, 2)`.

torch asks for the value of a 0-d index, which does not exist while tracing. Here the axis is read
with an index of one axis instead, `x[i.reshape(1)][0]`, and written to in the same way. A slice has
a constant length if its bounds are linear in the same tensors (`_counters.py`).

In eager torch `x[i]` is a view of `x`, here it is a copy. So a change in place of either is passed
on to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fdl import _modes
from fdl._compiler._counters import Counters
from fdl._compiler._covariance import COVARIANCES
from fdl._compiler._purity import changed_in_place, innermost
from fdl._compiler._user_lines import current_user_line, format_line
from fdl._dtensor import any_dtensor_type

BYTES = (torch.bool, torch.uint8)  # masks, as indices
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class _Part(NamedTuple):
    """The positions along one axis that an index refers to."""

    axis: int
    positions: Tensor  # [length]


class _Index(NamedTuple):
    """An index: `x[index]` is `x`, reduced to `parts` along some axes, `[rest]`."""

    parts: Sequence[_Part]
    rest: Any

    def is_view(self) -> bool:
        """Check that eager torch returns a view: nothing is indexed by a list or a mask."""
        rest = self.rest if isinstance(self.rest, tuple) else (self.rest,)
        return all(z is None or z is ... or isinstance(z, int | slice) for z in rest)

    def read(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = _rows(x, part)
        return x[self.rest]

    def write(self, x: Tensor, value: Any) -> None:
        """Write in place."""
        if not self.parts:
            x[self.rest] = value
            return
        part = self.parts[0]
        rows = _rows(x, part)
        self._replace(parts=self.parts[1:]).write(rows, value)
        # Along the first axis: torch's rule for index_put_ under vmap is wrong along others.
        x.movedim(part.axis, 0)[part.positions] = rows.movedim(part.axis, 0)


def _rows(x: Tensor, part: _Part) -> Tensor:
    return x[(slice(None),) * part.axis + (part.positions,)]


class DynamicIndex(TorchFunctionMode):
    """Replaces functions that ask for the value of an index by functions of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counters = Counters()
        self.copies = _Copies()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if any_dtensor_type(types):
            return func(*args, **kwargs)
        changed = changed_in_place(func, args, kwargs)
        if func in READS:
            x, index = READS[func](self.counters, *args, **kwargs)
            if index is not None:
                return self.copies.read(x, index) if index.is_view() else index.read(x)
        if func is torch.Tensor.__setitem__:
            x, index = _subscript(self.counters, *args[:2])
            if index is not None:
                func, args = index.write, (x, args[2])
        versions = self.copies.versions(args, kwargs)
        result = FUNCTIONS.get(func, func)(*args, **kwargs)
        changed = changed or [
            x for x, before in versions if innermost(x)._version != before
        ]  # inplace=True
        for x in changed:
            self.copies.changed(x)
            if not x.is_floating_point():
                self.counters.forget()
        if not changed:
            self.copies.keep(result)
            self.counters.note(name, (*args, *kwargs.values()), result)
        return result


class _Copies:
    """What was read through an index that is a tensor, to be kept equal to where it was read."""

    def __init__(self) -> None:
        self.sources = WeakTensorKeyDictionary()  # copy -> tensor, index

    def read(self, x: Tensor, index: _Index) -> Tensor:
        copy = index.read(x)
        self.sources[copy] = x, index
        return copy

    def versions(self, *args: Any) -> list[tuple[Tensor, int]]:
        """Return the tensors among arguments, and how often each has been changed in place."""
        leaves = pytree.tree_leaves(args) if self.sources else ()
        return [(x, innermost(x)._version) for x in leaves if isinstance(x, Tensor)]

    def keep(self, result: Any) -> None:
        """Keep the copies alive of which a result is a view."""
        if self.sources:
            for x in result if isinstance(result, tuple | list) else [result]:
                copies = [c for c in self.sources if isinstance(x, Tensor) and _share(c, x)]
                if copies and x is not copies[0]:
                    x._fdl_copy = copies[0]

    def changed(self, x: Tensor) -> None:
        """Pass on a change in place to the copies of `x`, and to what `x` is a copy of."""
        self._refresh_copies(x)
        for copy, (source, index) in list(self.sources.items()):
            if _share(copy, x):
                index.write(source, copy)
                self.changed(source)

    def _refresh_copies(self, x: Tensor) -> None:
        for copy, (source, index) in list(self.sources.items()):
            if _share(source, x) and functorch.unwrap_if_dead(copy) is copy:
                copy.copy_(index.read(source))
                self._refresh_copies(copy)


def _share(x: Tensor, y: Tensor) -> bool:
    x, y = innermost(x), innermost(y)
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _subscript(counters: Counters, x: Tensor, index: Any) -> tuple[Tensor, _Index | None]:
    """Resolve `x[index]`; None for an index without 0-d tensors."""
    given = index if isinstance(index, tuple) else (index,)
    if not any(map(_is_dynamic, given)):
        return x, None
    items = [_stacked(z) if isinstance(z, list) and _is_dynamic(z) else z for z in given]
    axes = [_axes(item) for item in items]
    missing = x.ndim - sum(axes)
    if missing < 0:
        raise IndexError(f"too many indices for tensor of dimension {x.ndim}")
    parts, rest, axis = [], list(items), 0
    for i, item in enumerate(items):
        if _is_number(item):
            parts.append(_Part(axis, _wide(item).reshape(1)))
            rest[i] = 0
        elif _has_tensors(item):
            parts.append(_range(counters, x, axis, item))
            rest[i] = slice(None)
        axis += missing if item is Ellipsis else axes[i]
    return x, _Index(parts, tuple(rest))


def _axes(item: Any) -> int:
    """Return how many axes an index consumes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype in BYTES else 1


def _is_number(item: Any) -> bool:
    """Check for a tensor that acts as an int: a bool or byte is a mask."""
    is_tensor = isinstance(item, Tensor) and item.ndim == 0
    return is_tensor and item.dtype in INTEGERS and item.dtype not in BYTES


def _is_dynamic(item: Any) -> bool:
    """Check for an index that torch would take a value from."""
    if isinstance(item, list):
        return any(map(_is_dynamic, item))
    return _is_number(item) or _has_tensors(item)


def _stacked(item: Any) -> Tensor:
    """Turn numbers, 0-d tensors and lists of these into a tensor."""
    if isinstance(item, list):
        return torch.stack([_stacked(z) for z in item])
    return _substitute(item).to(torch.int64) if isinstance(item, Tensor) else torch.full((), item)


def _has_tensors(item: Any) -> bool:
    """Check for a slice with bounds that are tensors."""
    return isinstance(item, slice) and any(
        isinstance(z, Tensor) and z.ndim == 0 and z.dtype in (*INTEGERS, torch.bool)
        for z in (item.start, item.stop, item.step)
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.int64, torch.int32) else x.to(torch.int64)


def _range(counters: Counters, x: Tensor, axis: int, item: Any) -> _Part:
    """Resolve a slice along one axis; a range that leaves `x` is an error, not cut off."""
    start, stop, step = item.start, item.stop, 1 if item.step is None else item.step
    length = None
    if isinstance(start, Tensor) and isinstance(stop, Tensor) and isinstance(step, int):
        # Slices hide tensors from the mode that replaces those of transformations.
        length = counters.difference(stop, start)
        start = _substitute(start)
        if length is None:
            length = counters.difference(_substitute(stop), start)
    if length is None or length < 0 or step < 1:
        raise RuntimeError(
            "jit: the shape of a slice depends on the value of a tensor, at "
            f"{format_line(current_user_line())}; while tracing there are no values: write both "
            "bounds with the same tensor (x[i:i + 2], x[i * 8:(i + 1) * 8]), use "
            "torch.narrow(x, dim, i, length), or keep the shape and choose with torch.where"
        )
    first = _wide(start)
    if length:  # the end of the tensor is not negative
        first = torch.where(first + length < 0, first + x.shape[axis], first)
    return _positions(x, axis, first, range(0, length, step))


def _positions(x: Tensor, axis: int, first: Tensor, steps: range) -> _Part:
    size = x.shape[axis]
    if steps and steps[-1] >= size:
        raise IndexError(
            f"jit: a slice of {steps[-1] + 1} elements leaves axis {axis} of shape {list(x.shape)}"
        )
    offsets = torch.arange(steps.start, steps.stop, steps.step, device=x.device)
    # A negative position would count from the end: make it one that is out of range.
    return _Part(axis, torch.where(first < 0, size, first) + offsets)


def _substitute(x: Tensor) -> Tensor:
    return cast(Tensor, _modes.tracing.get().substitute(x))


def _select(
    counters: Counters, input: Tensor, dim: Any, index: Any
) -> tuple[Tensor, _Index | None]:
    is_index = isinstance(index, Tensor) and index.ndim == 0 and index.dtype in INTEGERS
    if not is_index or not isinstance(dim, int):
        return input, None
    before = (slice(None),) * _axis(input, dim)
    return _subscript(counters, input, (*before, index.to(torch.int64)))


def _narrow(
    counters: Counters, input: Tensor, dim: Any, start: Any, length: Any
) -> tuple[Tensor, _Index | None]:
    is_index = isinstance(start, Tensor) and start.ndim == 0 and start.dtype in INTEGERS
    if not is_index or not isinstance(dim, int) or not isinstance(length, int) or length < 0:
        return input, None
    axis, first = _axis(input, dim), _wide(start)
    first = torch.where(first < 0, first + input.shape[axis], first)
    return input, _Index([_positions(input, axis, first, range(length))], ...)


def _axis(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-x.ndim}, {x.ndim - 1}], but "
            f"got {dim})"
        )
    return dim % x.ndim


READS: dict[Any, Callable[..., tuple[Tensor, _Index | None]]] = {
    torch.Tensor.__getitem__: _subscript,
    **dict.fromkeys((torch.select, torch.Tensor.select), _select),
    **dict.fromkeys((torch.narrow, torch.Tensor.narrow), _narrow),
}


def _index_select(input: Tensor, dim: Any, index: Any) -> Tensor:
    # torch's rule for vmap is wrong for a 0-d index.
    index = index.reshape(1) if isinstance(index, Tensor) and index.ndim == 0 else index
    return torch.index_select(input, dim, index)


def _take(input: Tensor, index: Any) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        return torch.take(input, index)
    return input.reshape(-1)[index.reshape(-1)].reshape(index.shape)


def _one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    """Write ones where labels are: torch reads their values, which `_indices.py` checks here."""
    if num_classes <= 0 or x.dtype != torch.int64:
        return F.one_hot(x, num_classes)
    zeros = torch.zeros(*x.shape, num_classes, dtype=torch.int64, device=x.device)
    return zeros.scatter(-1, x.unsqueeze(-1), 1)


FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.one_hot: _one_hot,
    **COVARIANCES,
    **dict.fromkeys((torch.index_select, torch.Tensor.index_select), _index_select),
    **dict.fromkeys((torch.take, torch.Tensor.take), _take),
}
