"""What a traced function must not do besides changing its arguments: draw unseen, keep tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from fdl._compiler._closure import reached
from fdl._compiler._user_lines import Line, line_here, line_text
from fdl.tree._summary import shape_dtype

SWITCHES = ("train", "training", "dropout", "dropout_p")  # off, such operations draw nothing


def check_draw(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if an operation draws from a generator of torch's: a program has none to go on with."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    if any(given.get(name) in (False, 0.0) for name in SWITCHES if given.get(name) is not None):
        return
    raise ValueError(
        f"jit: {_name(func)} draws from torch's generator, at {line_text(line_here())}; in a "
        "jitted function random numbers come from a key, which is an argument: draw with "
        "fdl.random or fdl.nn.dropout, or take a module over with fdl.interop.from_module"
    )


class _Made(NamedTuple):
    tensor: Callable[[], Tensor | None]
    how: str
    line: Line | None


class Watch:
    """The tensors that were made while tracing: none may outlive it."""

    def __init__(self) -> None:
        self.made: list[_Made] = []

    def note(self, tensors: Any, func: Any = None) -> None:
        """Remember what an operation made, or what the function is given."""
        how = "an argument" if func is None else f"made by {_name(func)}"
        line = None if func is None else line_here()
        for tensor in tensors if isinstance(tensors, tuple | list) else [tensors]:
            if isinstance(tensor, Tensor):
                self.made.append(_Made(weakref.ref(tensor), how, line))

    def check(self, fn: Callable[..., Any], graph: GraphModule, what: str, since: int = 0) -> None:
        """Raise if `fn`, now traced, has put a tensor somewhere.

        Args:
            fn: the function.
            graph: what was traced, which has tensors of its own.
            what: the name of the function in errors.
            since: how many tensors were made before it was called.
        """
        own = {id(value) for value in _values(graph)}
        made, self.made[since:] = self.made[since:], []
        alive = partial(_alive, made, own)
        if alive() and (gc.collect(), alive())[1]:  # cycles look kept
            raise ValueError(
                f"{what} keeps a tensor after it returned: {_describe(alive(), fn)}. It is traced, "
                "not run, so there is no value to keep: return the tensor, and keep it outside"
            )


def _alive(made: Iterable[_Made], own: set[int]) -> list[_Made]:
    return [m for m in made if (tensor := m.tensor()) is not None and id(tensor) not in own]


def _describe(kept: list[_Made], fn: Callable[..., Any]) -> str:
    """Name the first that is found by a name, or else the first."""
    names = {id(_innermost(tensor)): name for name, tensor in reached(fn)}
    named = [(names.get(id(m.tensor())), m) for m in kept]
    name, made = next((pair for pair in named if pair[0]), named[-1])
    tensor = made.tensor()
    assert tensor is not None
    where = f" at {line_text(made.line)}" if made.line else ""
    origin = f"{shape_dtype(tensor)}, {made.how}{where}"
    return f"{name}, {origin}" if name else origin


def _innermost(tensor: Tensor) -> Tensor:
    """Unwrap what torch.func has put around a tensor."""
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
