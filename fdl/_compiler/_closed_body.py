"""Trace a loop body that is called under transformations: a graph that closes over nothing.

Under `grad`, `vmap` or `jvp` a body closes over tensors that the transformations wrap. As in JAX
the body is traced outside of all of them, on plain tensors, and each wrapped tensor that it closes
over becomes an argument. To find those, every operation of the body is intercepted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, has_proxy_slot
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fdl import _modes
from fdl._compiler._closure import closed_over_tensors
from fdl._compiler._graph import nodes_of, results_of
from fdl._compiler._scan_traced import FlatBody
from fdl._compiler._trace import current_trace, trace_flat


class CannotClose(Exception):
    """A tensor that the body closes over cannot be told from one that it makes."""


class ClosedBody(NamedTuple):
    """The graph of a loop body, and what the loop around it starts from."""

    graph: GraphModule  # (*carry, *row, *closed_over) -> [*carry, *y]
    init: list[Tensor]
    xs: list[Tensor]
    closed_over: list[Tensor]


def close_body(f: Callable[..., Any], flat: FlatBody) -> ClosedBody:
    """Trace the body of a scan outside of the active transformations.

    Args:
        f: the body, for error messages.
        flat: the same as a function of leaves.

    Raises:
        CannotClose: see there.
    """
    leaks = current_trace().leaks
    made_before = len(leaks.made)
    with _outside_transforms():
        fakes = [*(plain(leaf) for leaf in flat.init), *(plain(leaf, 1) for leaf in flat.xs)]
        leaks.note(fakes)
        with Substitutes(f) as substitutes:
            graph, closed_over = trace_flat(
                lambda *leaves: [substitutes.replace(leaf) for leaf in flat.fn(*leaves)],
                fakes,
                flat.names,
            )
    originals = substitutes.originals
    del fakes, substitutes
    leaks.check(f, graph, "scan: the body", made_before)
    closed_over = [originals.get(id(leaf), leaf) for leaf in closed_over]
    return ClosedBody(graph, flat.init, flat.xs, closed_over)


def closed_graph(fn: Callable[..., list[Tensor]], examples: Sequence[Tensor]) -> GraphModule:
    """Trace a function that closes over no tensors, for arguments like `examples`."""
    leaks = current_trace().leaks
    made_before = len(leaks.made)
    with _outside_transforms():
        graph, constants = trace_flat(fn, [plain(leaf) for leaf in examples], ())
    assert not constants, "the body of a loop is closed"
    del leaks.made[made_before:]
    return graph


def plain(leaf: Tensor, axes: int = 0) -> Tensor:
    """Make a fake tensor like one that may be wrapped, without its first `axes` axes."""
    shape = leaf.shape[axes:]
    with disable_proxy_modes_tracing(), _disable_current_modes(), current_trace().mode:
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)


@contextmanager
def _outside_transforms() -> Iterator[None]:
    """Leave all transformations, and record operations that the transformations know."""
    tracing = current_trace()
    decompose, tracing.decompose = tracing.decompose, False
    token = _modes.around.set(_modes.active())
    try:
        with ExitStack() as stack:
            stack.enter_context(disable_proxy_modes_tracing())
            stack.enter_context(temporarily_clear_interpreter_stack())
            if _modes.avoid_fused_kernels():
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        _modes.around.reset(token)
        tracing.decompose = decompose


class Substitutes(TorchFunctionMode):
    """Replaces each wrapped tensor from outside of a body by a plain one."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f
        self.tracing = current_trace()
        self.since = len(self.tracing.tracers)
        self.originals: dict[int, Tensor] = {}  # by the id of the plain tensor
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the first, kept alive

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self.replace, (args, kwargs or {}))
        return func(*args, **kwargs)

    def replace(self, x: Tensor) -> Tensor:
        """Return the plain tensor that stands for `x`, or `x` if it was made in the body."""
        if not functorch.is_functorch_wrapped_tensor(x):
            return x
        if id(x) not in self.replaced:
            layers = [x]
            while functorch.is_functorch_wrapped_tensor(layers[-1]):
                layers.append(functorch.get_unwrapped(layers[-1]))
            if self._is_inside(layers[-1]):
                return x
            self.replaced[id(x)] = x, self._rebuild(layers)
        return self.replaced[id(x)][1]

    def _rebuild(self, layers: list[Tensor]) -> Tensor:
        """Replace the tensor from outside, and wrap it as the body did."""
        first = 0  # outside of a transformation in the body, nothing is wrapped by the body
        if functorch.peek_interpreter_stack() is not None:
            first = next((i for i, x in enumerate(layers) if id(x) in self._outside), -1)
            if first < 0:
                raise CannotClose
        if first == len(layers) - 1:  # plain already
            return layers[0]
        new = plain(layers[first])
        self.originals[id(new)] = layers[first]
        self.replaced[id(layers[first])] = layers[first], new
        for layer in reversed(layers[:first]):
            level = functorch.maybe_get_level(layer)
            if functorch.is_batchedtensor(layer):
                new = functorch._add_batch_dim(new, functorch.maybe_get_bdim(layer), level)
            else:
                new = functorch._wrap_for_grad(new, level)
        return new

    @cached_property
    def _outside(self) -> set[int]:
        return {id(tensor) for _, tensor in closed_over_tensors(self.f)}

    def _is_inside(self, x: Tensor) -> bool:
        tracers = self.tracing.tracers[self.since :]
        return id(x) in self.originals or any(has_proxy_slot(x, tracer) for tracer in tracers)
