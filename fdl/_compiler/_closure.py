"""The tensors that a function closes over, found by name and read again at each call.

A trace contains tensors, not the names by which the function reached them. The names are searched
for once, after tracing: from the function through its closure, the globals that it mentions,
default arguments, attributes and containers.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import getitem
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._compiler._user_lines import is_user_code
from fdl.tree._paths import join
from fdl.tree._summary import shape_dtype

FOREIGN = {
    "torch",
    "fdl",
    "numpy",
    *sys.stdlib_module_names,
}  # without tensors of users
REGISTRIES = {"_parameters", "_buffers", "_modules"}  # of nn.Module: left out of names
MAX_OBJECTS = 200_000  # where a walk stops


class Edge(NamedTuple):
    """One step of a path from a function to something that it closes over."""

    read: Callable[[Any, Any], Any]  # (holder, key) -> value
    holder: Any
    key: Any
    value: Any  # when it was read
    name: str


class Sources:
    """The tensors that a traced program closes over, and the paths on which to read them again."""

    def __init__(self, fn: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        self.root = fn
        self.tensors = list(tensors)
        edges = list(_walk(fn)) if tensors else []
        self._take(_leading_to(tensors, edges))

    def _take(self, edges: list[Edge]) -> None:
        self.edges = edges
        holders = {id(edge.holder): edge.holder for edge in edges}
        self.sizes = [(x, len(x)) for x in holders.values() if isinstance(x, dict | list | tuple)]

    def read(self) -> list[Tensor] | None:
        """Return the tensors that the function would reach now, or None if it must be retraced."""
        try:
            if all(read(holder, key) is value for read, holder, key, value, _ in self.edges) and (
                all(len(holder) == size for holder, size in self.sizes)
            ):
                return self.tensors
            return self._follow()
        except (LookupError, AttributeError, ValueError):  # a name no longer exists
            return None

    def _follow(self) -> list[Tensor] | None:
        """Follow the same paths again; all paths that led to one tensor must agree."""
        now: dict[int, Any] = {id(self.root): self.root}  # what replaces each object
        edges = []
        for read, old, key, before, name in self.edges:
            holder = now[id(old)]
            value = read(holder, key)
            if now.setdefault(id(before), value) is not value or not _are_alike(before, value):
                return None
            edges.append(Edge(read, holder, key, value, name))
        if any(len(now[id(holder)]) != size for holder, size in self.sizes):
            return None
        self.tensors = [now.get(id(tensor), tensor) for tensor in self.tensors]
        self._take(edges)
        return self.tensors

    def names(self) -> list[str]:
        """Return the path of each tensor."""
        paths = _paths(self.root, self.edges)
        unnamed = "without a name: fixed at the first call"
        return [paths.get(id(x), f"{shape_dtype(x)}, {unnamed}") for x in self.tensors]


def check_closed_over(
    constants: Sequence[Tensor], leaves: Sequence[Tensor], donated: Sequence[int], grad: bool
) -> None:
    """Raise if a closed-over tensor is donated by this call, or requires grad in grad mode."""
    if constants and donated:
        memory = {leaves[i].untyped_storage()._cdata for i in donated}
        if any(leaf.untyped_storage()._cdata in memory for leaf in constants):
            raise ValueError("jit: a donated tensor is also closed over by the function; clone it")
    if grad and any(leaf.requires_grad for leaf in constants):
        raise ValueError(
            "jit: the function closes over a tensor that requires grad, which backward() would not "
            "reach; pass it as an argument, detach it, or call under torch.no_grad()"
        )


def closed_over_tensors(fn: Callable[..., Any]) -> Iterator[tuple[str, Tensor]]:
    """List the tensors that a function closes over, each with its name.

    >>> w = torch.ones(2)
    >>> [name for name, _ in closed_over_tensors(lambda x: x * w)]
    ['w']
    """
    edges = list(_walk(fn))
    paths = _paths(fn, edges)
    tensors = {id(edge.value): edge.value for edge in edges if isinstance(edge.value, Tensor)}
    yield from ((paths[i], tensor) for i, tensor in tensors.items())


def _leading_to(targets: Sequence[Any], edges: Sequence[Edge]) -> list[Edge]:
    """Select the edges on the paths to `targets`, in the order of the walk."""
    into: dict[int, list[Edge]] = {}
    for edge in edges:
        into.setdefault(id(edge.value), []).append(edge)
    wanted, queue = set[int](), [id(target) for target in targets]
    while queue:
        i = queue.pop()
        if i not in wanted:
            wanted.add(i)
            queue += [id(edge.holder) for edge in into.get(i, ())]
    return [edge for edge in edges if id(edge.value) in wanted]


def _paths(root: Any, edges: Sequence[Edge]) -> dict[int, str]:
    paths = {id(root): ""}
    for edge in edges:
        path = join(paths[id(edge.holder)], edge.name)
        paths.setdefault(id(edge.value), path)
    return paths


def _are_alike(old: Any, new: Any) -> bool:
    """Check whether a program traced with `old` may be used with `new`."""
    if isinstance(old, Tensor):
        return isinstance(new, Tensor)
    if isinstance(old, FunctionType):
        return isinstance(new, FunctionType) and old.__code__ is new.__code__
    return type(old) is type(new)


def _walk(root: Any) -> Iterator[Edge]:
    """List every edge that can be reached from a function, breadth first."""
    queue, seen = deque([root]), {id(root)}
    keep = [root]  # keeps objects created on the way, such as bound methods, and so their ids
    while queue and len(seen) < MAX_OBJECTS:
        for edge in _parts(queue.popleft()):
            yield edge
            if id(edge.value) not in seen:
                seen.add(id(edge.value))
                keep.append(edge.value)
                queue.append(edge.value)


ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _parts(x: Any) -> Iterator[Edge]:
    """List what an object holds."""
    if isinstance(x, ATOMS):
        return
    if isinstance(x, FunctionType):
        yield from _parts_of_function(x)
    elif isinstance(x, MethodType):
        yield Edge(getattr, x, "__self__", x.__self__, "self")
        yield Edge(getattr, x, "__func__", x.__func__, "")
    elif isinstance(x, partial):
        for name in ("func", "args", "keywords"):
            yield Edge(getattr, x, name, getattr(x, name), "")
    elif isinstance(x, property | classmethod | staticmethod):
        name = "fget" if isinstance(x, property) else "__func__"
        yield Edge(getattr, x, name, getattr(x, name), "")
    elif isinstance(x, Tensor):
        yield from _parts_of_tensor(x)
    elif isinstance(x, type):
        if not _is_foreign(x.__module__):
            for name, value in vars(x).items():
                yield Edge(_attribute, x, name, value, name)
    elif isinstance(x, dict):
        for key, value in list(x.items()):
            yield Edge(dict.get, x, key, value, str(key))
    elif isinstance(x, list | tuple | deque):
        for i, value in enumerate(x):
            yield Edge(getitem, x, i, value, str(i))
    if not isinstance(x, FunctionType | Tensor | type | ModuleType):
        yield from _parts_of_object(x)


def _parts_of_function(fn: FunctionType) -> Iterator[Edge]:
    if fn.__globals__.get("__name__") == f"{__package__}._jit" and "__wrapped__" in vars(fn):
        # A jitted function: follow the original, not the programs in its cache.
        yield Edge(_attribute, fn, "__wrapped__", vars(fn)["__wrapped__"], "")
        return
    for i, cell in enumerate(fn.__closure__ or ()):
        yield Edge(_cell, fn, i, cell, fn.__code__.co_freevars[i])
    for name in ("__defaults__", "__kwdefaults__"):
        defaults = getattr(fn, name)
        if defaults:
            yield Edge(getattr, fn, name, defaults, "default")
    for name, value in vars(fn).items():
        yield Edge(_attribute, fn, name, value, name)
    if is_user_code(fn.__code__):
        names = _names(fn.__code__)
        for name in names & fn.__globals__.keys():
            value = fn.__globals__[name]
            yield Edge(_global, fn, name, value, name)
            yield from _parts_of_module(value, names)


def _parts_of_module(module: Any, names: set[str]) -> Iterator[Edge]:
    """List the attributes of a module that the code of a function mentions."""
    if not isinstance(module, ModuleType) or _is_foreign(module.__name__):
        return
    for name in names & vars(module).keys():
        value = vars(module)[name]
        yield Edge(_attribute, module, name, value, name)
        if value is not module:
            yield from _parts_of_module(value, names - {name})


def _parts_of_tensor(x: Tensor) -> Iterator[Edge]:
    if x.is_leaf and x.grad is not None:
        yield Edge(getattr, x, "grad", x.grad, "grad")
    for name, value in vars(x).items():
        yield Edge(_attribute, x, name, value, name)


def _parts_of_object(x: Any) -> Iterator[Edge]:
    if type(x).__name__ == "cell":
        try:
            yield Edge(getattr, x, "cell_contents", x.cell_contents, "")
        except ValueError:  # still empty
            return
    for name, value in list(getattr(x, "__dict__", {}).items()):
        yield Edge(_attribute, x, name, value, "" if name in REGISTRIES else name)
    for kind in type(x).__mro__:
        if not _is_foreign(kind.__module__):
            yield Edge(_class, x, type(x).__mro__.index(kind), kind, "")
            for name in _slots(kind):
                if hasattr(x, name):
                    yield Edge(getattr, x, name, getattr(x, name), name)


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] in FOREIGN


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _names(code: CodeType) -> set[str]:
    """Return the names that code mentions, including its inner functions."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _cell(fn: FunctionType, i: int) -> Any:
    return (fn.__closure__ or ())[i]


def _global(fn: FunctionType, name: str) -> Any:
    return fn.__globals__[name]


def _attribute(x: Any, name: str) -> Any:
    return vars(x).get(name)


def _class(x: Any, i: int) -> Any:
    return type(x).__mro__[i]
