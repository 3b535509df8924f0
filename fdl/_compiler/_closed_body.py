"""Trace a loop body that is called under transformations: a graph that closes over nothing.

Under `grad`, `vmap` or `jvp` a body closes over tensors that the transformations wrap. As in JAX
the body is traced outside of all of them, on plain tensors, and each wrapped tensor that it closes
over becomes an argument. To find those, every operation of the body is intercepted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, has_proxy_slot
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fdl import _modes
from fdl._compiler._custom_functions import CannotClose, recording
from fdl._compiler._differentiable_ops import has_strides_of_its_own
from fdl._compiler._graph import is_smooth
from fdl._compiler._patches import Hook, patching
from fdl._compiler._purity import changed_in_place, innermost
from fdl._compiler._scan_traced import FlatBody
from fdl._compiler._trace import current_trace, plain, trace_flat, trace_part

DEAD = -2  # the level of a tensor whose transformation has ended


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
    originals: dict[int, tuple[Tensor, Tensor]] = {}

    def fn(*leaves: Tensor) -> list[Tensor]:
        with Substitutes(originals) as substitutes:
            return [substitutes.replace(leaf) for leaf in flat.fn(*leaves)]

    def arguments() -> list[Tensor]:
        return [*map(plain, flat.init), *(plain(leaf, 1) for leaf in flat.xs)]

    with _outside_transforms():
        graph, closed_over = trace_part(f, fn, arguments, flat.names, "scan: the body")
    if has_strides_of_its_own(graph.graph):
        raise CannotClose("its body calls as_strided on a tensor that is not contiguous")
    closed_over = [
        current_trace().substitute(originals.get(id(leaf), (leaf, leaf))[1]) for leaf in closed_over
    ]
    return ClosedBody(graph, flat.init, flat.xs, closed_over)


def closed_graph(
    fn: Callable[..., list[Tensor]], examples: Sequence[Tensor]
) -> tuple[GraphModule, list[Tensor]]:
    """Trace a function of tensors, for arguments like `examples`.

    Returns:
        The graph, and its last arguments: tensors that custom functions in it close over.
    """
    leaks = current_trace().leaks
    made_before = len(leaks.made)
    with _outside_transforms():
        graph, closed_over = trace_flat(fn, [plain(leaf) for leaf in examples], ())
    del leaks.made[made_before:]
    return graph, closed_over


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
            stack.enter_context(_hooks())
            if _modes.avoid_fused_kernels():
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        _modes.around.reset(token)
        tracing.decompose = decompose


class _NoGrad(torch.autograd.Function):
    """The identity, through which no gradient flows back; tangents do, as under `no_grad`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return cast(Tensor, _NoGrad.apply(tangent))


class Substitutes(TorchFunctionMode):
    """Replaces each wrapped tensor from outside of a body by a plain one.

    Inside a transformation in the body, plain tensors from outside are replaced, too: then a
    wrapped tensor is made by the body if the plain one in it is known.
    """

    def __init__(self, originals: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Record substitutes in `originals`, with what they replace, by their ids."""
        super().__init__()
        self.originals, self.tracing = originals, current_trace()
        self.has_grad = torch.is_grad_enabled() and "Grad" in _modes.active()
        self.stops = False  # under no_grad, where gradients of the transformations stop
        self.has_derivative = self.has_grad or "Jvp" in _modes.active()
        self.detached: list[Callable[[], Tensor | None]] = []  # weak references
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
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            func = Tensor.detach  # which is an operation
        inside = _modes.in_transform()
        if func == Tensor.requires_grad.__get__ and not inside:  # type: ignore[attr-defined]
            # Kernels without a derivative are chosen where nothing requires grad. (A pullback asks
            # about results that are wrapped, although its transformation has ended.)
            is_plain = not functorch.is_functorch_wrapped_tensor(args[0])
            if is_plain:
                return self.has_grad and is_smooth(args[0]) and self._is_known(args[0])
        if func is torch._C._set_grad_enabled and not inside:
            self.stops = self.has_grad and not args[0]
        self._check(func, args, kwargs or {}, inside)
        replace = partial(self.replace, inside=inside)
        args, kwargs = pytree.tree_map_only(Tensor, replace, (args, kwargs or {}))
        if self.stops:
            args, kwargs = pytree.tree_map_only(Tensor, self._stop, (args, kwargs))
        result = func(*args, **kwargs)
        if func in (Tensor.detach, torch.detach):
            self.detached.append(weakref.ref(result))
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, inside: bool) -> None:
        """Raise for what only autograd understands: no graph of operations records it."""
        if not self.has_derivative:
            return
        changed = changed_in_place(func, args, kwargs)
        if self.stops:
            self.refuse_no_grad(bool(changed) or inside)
        if func in (Tensor.detach_, torch.detach_) or any(map(self._is_detached, changed)):
            raise CannotClose("its body changes what it has detached, or detaches in place")
        if (
            func is torch.autograd.grad
            and not inside
            and not any(
                isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x)  # by a vjp
                for x in pytree.tree_leaves(args)
            )
        ):
            raise CannotClose("its body calls torch.autograd.grad; use torch.func.grad")

    def _is_detached(self, x: Tensor) -> bool:
        """Check whether a tensor shares memory with one that the body has detached."""
        memory = innermost(x).untyped_storage()._cdata
        detached = [y for reference in self.detached if (y := reference()) is not None]
        return any(innermost(y).untyped_storage()._cdata == memory for y in detached)

    def refuse_no_grad(self, unless_plain: bool = True) -> None:
        """Raise under `no_grad`, except for plain functions, whose arguments can be detached."""
        if self.stops and unless_plain:
            raise CannotClose("its body uses no_grad; use fdl.transforms.stop_gradient")

    def _stop(self, x: Tensor) -> Tensor:
        if not (is_smooth(x) and isinstance(x, FakeTensor) and self._is_known(x)):  # or wrapped
            return x
        self.stops = False
        stopped = cast(Tensor, _NoGrad.apply(x))
        self.stops = True
        return stopped

    def replace(self, x: Tensor, inside: bool = False) -> Tensor:
        """Return the plain tensor that stands for `x`, or `x` if it was made in the body."""
        if not (inside or functorch.is_functorch_wrapped_tensor(x)):
            return x
        if id(x) not in self.replaced:
            if self._is_known(innermost(x)):
                return x
            if functorch.maybe_get_level(x) == DEAD:  # kept by the pullback of a vjp
                raise CannotClose("its body calls a pullback that was made outside; make it inside")
            new = plain(x)
            self.originals[id(new)] = new, x
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
        if tracing is not None:
            x = tracing.substitute(x, inside=True)
        return wrap(x, *rest)

    return wrapper


# What no mode sees: (owner, name, what makes a replacement of what is there).
HOOKS: tuple[Hook, ...] = (
    (eager_transforms, "_wrap_for_grad", _replacing),  # the arguments of grad, jvp, …
    (torch._functorch.vmap, "_add_batch_dim", _replacing),
    (torch.autograd.Function, "apply", recording),
)
_hooks = patching(*HOOKS)
