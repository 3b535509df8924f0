"""Pickle the functions of a model.

Pickle stores a function by its name and finds only those at the top of a module, but a model
consists of local functions: the `apply` that `nn.linear(3, 2)` returns closes over the sizes. Such
a function is stored as the name of its code and the values that it closes over. As for any other
function, the code itself is not stored, but looked up in its module.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from inspect import unwrap
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple


class _Place(NamedTuple):
    """Where the code of a local function is."""

    module: str
    qualname: str  # such as "linear.<locals>.apply"
    number: int  # of several functions with this name, such as lambdas
    closed_over: tuple[str, ...]  # names, sorted as in `__closure__`


def dumps(x: Any) -> bytes:
    """Pickle a tree with functions.

    Raises:
        TypeError: a function is not in a module that can be imported.

    >>> from fdl import nn, random
    >>> net = nn.sequential(nn.linear(3, 2), nn.relu)
    >>> list(loads(dumps(net)).init(random.key(0)))
    ['0']
    """
    file = io.BytesIO()
    _Pickler(file, protocol=4).dump(x)
    return file.getvalue()


loads = pickle.loads


class _Pickler(pickle.Pickler):
    def reducer_override(self, x: Any) -> Any:
        """Say how to store a local function; everything else is stored as usual."""
        if not isinstance(x, FunctionType) or "<" not in x.__qualname__:
            return NotImplemented
        state = (_contents(x), x.__defaults__, x.__kwdefaults__, x.__dict__)
        return _make, (_place(x),), state, None, None, _fill


def _place(fn: FunctionType) -> _Place:
    try:
        codes = _codes(fn.__module__, fn.__qualname__)
        number = codes.index(fn.__code__)
    except (AttributeError, ImportError, ValueError):
        raise TypeError(
            f"cannot pickle {fn.__qualname__!r} of {fn.__code__.co_filename}:"
            f"{fn.__code__.co_firstlineno}: its code is not in a function of a module that can be "
            "imported; define it with def at the top of a module, or in a function there"
        ) from None
    return _Place(fn.__module__, fn.__qualname__, number, fn.__code__.co_freevars)


def _codes(module: str, qualname: str) -> list[CodeType]:
    """List the code objects with this name that the functions of a module contain."""
    owner: Any = importlib.import_module(module)
    for name in qualname.partition(".<locals>")[0].split("."):
        owner = getattr(owner, name)
    return [code for code in _inside(unwrap(owner).__code__) if code.co_qualname == qualname]


def _inside(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inside(constant)


def _contents(fn: FunctionType) -> list[Any]:
    return [cell.cell_contents for cell in fn.__closure__ or ()]


def _make(place: _Place) -> Callable[..., Any]:
    """Make a function without what it closes over, which may contain the function itself."""
    codes = _codes(place.module, place.qualname)
    code = codes[place.number] if place.number < len(codes) else None
    if code is None or code.co_freevars != place.closed_over:
        raise ValueError(
            f"cannot load {place.qualname!r}: it is not the function in {place.module} that was "
            "stored; save state_dict() instead of modules, which does not depend on code"
        )
    cells = tuple(CellType() for _ in place.closed_over)
    return FunctionType(code, vars(importlib.import_module(place.module)), closure=cells)


def _fill(fn: FunctionType, state: tuple[Any, ...]) -> None:
    contents, fn.__defaults__, fn.__kwdefaults__, attributes = state
    for cell, value in zip(fn.__closure__ or (), contents, strict=True):
        cell.cell_contents = value
    fn.__dict__.update(attributes)
