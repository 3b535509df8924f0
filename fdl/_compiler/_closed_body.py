"""Trace a loop body that is called under transformations: a graph that closes over nothing.

Under `grad`, `vmap` or `jvp` a body closes over tensors that the transformations wrap. As in JAX
the body is traced outside of all of them, on plain tensors, and each wrapped tensor that it closes
over becomes an argument. To find those, every operation of the body is intercepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, Self

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, has_proxy_slot
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fdl import _modes
from fdl._compiler._purity import innermost
from fdl._compiler._scan_traced import FlatBody
from fdl._compiler._trace import current_trace, trace_flat


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
    """
    leaks = current_trace().leaks
    made_before = len(leaks.made)
    with _outside_transforms():
        fakes = [*(plain(leaf) for leaf in flat.init), *(plain(leaf, 1) for leaf in flat.xs)]
        leaks.note(fakes)
        originals: dict[int, Tensor] = {}

        def fn(*leaves: Tensor) -> list[Tensor]:
            with _replacing_in_transforms(), Substitutes(originals) as substitutes:
                return [substitutes.replace(leaf) for leaf in flat.fn(*leaves)]

        graph, closed_over = trace_flat(fn, fakes, flat.names)
    del fakes
    leaks.check(f, graph, "scan: the body", made_before)
    closed_over = [
        current_trace().substitute(originals.get(id(leaf), leaf)) for leaf in closed_over
    ]
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
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        current_trace().mode,
    ):
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
    """Replaces each wrapped tensor from outside of a body by a plain one.

    Inside a transformation in the body, plain tensors from outside are replaced, too: then a
    wrapped tensor is made by the body if the plain one in it is known.
    """

    def __init__(self, originals: dict[int, Tensor]) -> None:
        """Record in `originals` what was replaced, by the id of its substitute."""
        super().__init__()
        self.originals, self.tracing = originals, current_trace()
        self.depth = len(self.tracing.substitutes)
        self.first_tracer = len(self.tracing.tracers) - 1  # that of the body
        self.replaced: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the first, kept alive

    def __enter__(self) -> Self:
        self.tracing.substitutes.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.tracing.substitutes.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = functorch.peek_interpreter_stack() is not None
        replace = partial(self.replace, inside=inside)
        args, kwargs = pytree.tree_map_only(Tensor, replace, (args, kwargs or {}))
        return func(*args, **kwargs)

    def replace(self, x: Tensor, inside: bool = False) -> Tensor:
        """Return the plain tensor that stands for `x`, or `x` if it was made in the body."""
        if not (inside or functorch.is_functorch_wrapped_tensor(x)):
            return x
        if id(x) not in self.replaced:
            if self._is_known(innermost(x)):
                return x
            new = plain(x)
            self.originals[id(new)] = x
            self.replaced[id(x)] = x, new
        return self.replaced[id(x)][1]

    def _is_known(self, x: Tensor) -> bool:
        """Check that a plain tensor was made in this body, or in one within it."""
        bodies = self.tracing.substitutes[self.depth :]
        return any(id(x) in body.originals for body in bodies) or any(
            has_proxy_slot(x, tracer) for tracer in self.tracing.tracers[self.first_tracer :]
        )


def _replacing(wrap: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let one of torch's functions that wrap tensors replace them first."""

    def wrapper(x: Tensor, *rest: Any) -> Tensor:
        tracing = _modes.tracing.get()
        return wrap(x if tracing is None else tracing.substitute(x, inside=True), *rest)

    return wrapper


_lock, _users = Lock(), 0


@contextmanager
def _replacing_in_transforms() -> Iterator[None]:
    """Replace the tensors that `grad` and `vmap` wrap in the body: no mode sees those calls."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for module, name in WRAPPERS:
                setattr(module, name, _replacing(getattr(functorch, name)))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for module, name in WRAPPERS:
                    setattr(module, name, getattr(functorch, name))


WRAPPERS = ((eager_transforms, "_wrap_for_grad"), (torch._functorch.vmap, "_add_batch_dim"))
