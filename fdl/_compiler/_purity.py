"""Side effects that a traced function must not have: hidden random draws, tensors that it keeps."""

from __future__ import annotations

import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from fdl._compiler._closure import closed_over_tensors
from fdl._compiler._user_lines import Line, current_user_line, format_line, is_user_code
from fdl._modes import is_tracing
from fdl.tree._summary import shape_dtype

PRINTERS = {
    *("_purity.py", "_dynamic_index.py", "_closed_body.py"),  # and torch's:
    *("_tensor.py", "_tensor_str.py", "overrides.py", "proxy_tensor.py"),
}
SWITCHES = ("train", "training", "dropout", "dropout_p")  # without these, nothing is drawn


def check_draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if an operation draws from torch's generator, whose state a program cannot advance."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return
    arguments = func._schema.arguments
    values = {a.name: a.default_value for a in arguments if a.has_default_value()}
    values |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    if any(values.get(name) in (False, 0.0) for name in SWITCHES if values.get(name) is not None):
        return
    raise ValueError(
        f"jit: {_name(func)} draws from torch's generator, at {format_line(current_user_line())}; "
        "in a jitted function randomness comes from a key, which is an argument: draw with "
        "fdl.random or fdl.nn.dropout, or convert the module with fdl.interop.from_module"
    )


def watch_prints() -> None:
    """Make a tensor that is printed while `jit` traces warn that it has no value."""

    def show(self: FakeTensor, **options: Any) -> str:
        if not is_tracing():
            return Tensor.__repr__(self, **options)
        _warn_about_print()
        # C++ code may print an argument that does not fit. `Tensor.__repr__` would ask for tangents
        # there, which fails and leaves torch's settings of the thread as they are at that place.
        return f"FakeTensor(..., size={tuple(self.shape)}, dtype={self.dtype})"

    def show_formatted(self: FakeTensor, spec: str) -> str:
        if is_tracing() and spec and not self.ndim:  # a number
            return format(self.item(), spec)  # raises, as for every other use of a value
        return Tensor.__format__(self, spec)

    fake = cast(Any, FakeTensor)
    fake.__repr__, fake.__format__ = show, show_formatted


def _warn_about_print() -> None:
    """Warn if user code prints a tensor, not a library that shows it in an error message."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and os.path.basename(frame.f_code.co_filename) in PRINTERS:
        frame = frame.f_back
    if frame is not None and is_user_code(frame.f_code):
        warnings.warn_explicit(
            "jit: a tensor is printed while tracing, once and without its value; "
            "fdl.debug.print prints it whenever the program runs",
            UserWarning,
            frame.f_code.co_filename,
            frame.f_lineno,
        )


def changed_in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a function of torch changes in place, as its name tells.

    >>> x = torch.zeros(2)
    >>> changed_in_place(Tensor.add_, (x, 1), {}), changed_in_place(Tensor.add, (x, 1), {})
    ([tensor([0., 0.])], [])
    """
    name = getattr(func, "__name__", "")
    in_place = name.startswith(("__i", "__set")) if name.startswith("__") else name.endswith("_")
    in_place = in_place and name != "requires_grad_"
    first = next(iter([*args, *kwargs.values()]), None)
    changed = first if in_place else kwargs.get("out")
    if changed is None:
        return []
    return [x for x in pytree.tree_leaves(changed) if isinstance(x, Tensor)]


class _TracedTensor(NamedTuple):
    tensor: Callable[[], Tensor | None]  # a weak reference
    origin: str
    line: Line | None


class LeakChecker:
    """Finds tensors of a trace that outlive it."""

    def __init__(self) -> None:
        self.made: list[_TracedTensor] = []

    def note(self, tensors: Any, func: Any = None) -> None:
        """Record the results of an operation, or without `func` the arguments."""
        origin = "an argument" if func is None else f"made by {_name(func)}"
        line = None if func is None else current_user_line()
        for tensor in tensors if isinstance(tensors, tuple | list) else [tensors]:
            if isinstance(tensor, Tensor):
                self.made.append(_TracedTensor(weakref.ref(tensor), origin, line))

    def check(self, fn: Callable[..., Any], graph: GraphModule, name: str, since: int = 0) -> None:
        """Raise if `fn`, which has been traced, keeps a tensor.

        Args:
            fn: the function.
            graph: its graph, which may keep tensors.
            name: name of the function in the error message.
            since: how many tensors were recorded before it was called.
        """
        in_graph = {id(value) for value in _values(graph)}
        made, self.made[since:] = self.made[since:], []
        alive = partial(_alive, made, in_graph)
        if alive() and (gc.collect(), alive())[1]:  # reference cycles keep tensors alive, too
            raise ValueError(
                f"{name} keeps a tensor after it returned: {_describe(alive(), fn)}. While tracing "
                "tensors have no values: return the tensor, and keep the result outside"
            )


def _alive(made: Iterable[_TracedTensor], known: set[int]) -> list[_TracedTensor]:
    return [m for m in made if (tensor := m.tensor()) is not None and id(tensor) not in known]


def _describe(kept: list[_TracedTensor], fn: Callable[..., Any]) -> str:
    """Describe the first kept tensor that has a name, or else the last one."""
    names = {id(innermost(tensor)): name for name, tensor in closed_over_tensors(fn)}
    named = [(names.get(id(m.tensor())), m) for m in kept]
    name, leaked = next((pair for pair in named if pair[0]), named[-1])
    tensor = leaked.tensor()
    assert tensor is not None
    where = f" at {format_line(leaked.line)}" if leaked.line else ""
    text = f"{shape_dtype(tensor)}, {leaked.origin}{where}"
    return f"{name}, {text}" if name else text


def innermost(tensor: Tensor) -> Tensor:
    """Remove the wrappers of torch.func from a tensor.

    >>> innermost(torch.zeros(2))
    tensor([0., 0.])
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _values(graph: GraphModule) -> Iterable[Any]:
    for module in graph.modules():
        if isinstance(module, GraphModule):
            yield from (*vars(module).values(), *module.buffers(recurse=False))
            for node in module.graph.nodes:
                value = node.meta.get("val")
                yield from value if isinstance(value, tuple | list) else [value]


def _name(func: Any) -> str:
    packet = getattr(func, "overloadpacket", func)
    return str(getattr(packet, "__name__", packet))
