"""Trace a pure Python function into a graph of tensor operations.

The function runs once on fake tensors, which have shapes and dtypes but no values, and `make_fx`
records each operation: below `torch.func`, so that `grad` and `vmap` are already resolved, and in
the primitives that Inductor knows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fdl import _modes
from fdl._compiler._decompositions import decompositions, early_decompositions
from fdl._compiler._deferred import deferred_imports
from fdl._compiler._divisors import check_divisor
from fdl._compiler._dtypes import check_dtypes
from fdl._compiler._dynamic_index import DynamicIndex
from fdl._compiler._fakes import fake_like, fake_mode
from fdl._compiler._fixed_shapes import FIXED_SHAPES
from fdl._compiler._graph import (
    LITERAL,
    LOOP,
    MOVE,
    aten,
    check_pure,
    is_mutable,
    nodes_of,
    prune_loop_outputs,
    results_of,
)
from fdl._compiler._indices import check_indices
from fdl._compiler._patches import views_in_bodies
from fdl._compiler._purity import LeakChecker, check_draw, watch_prints
from fdl._compiler._settings import as_written
from fdl._compiler._signature import argument_names, flatten, resolved, unflatten
from fdl._compiler._user_lines import format_line, user_line_of
from fdl._compiler._zeros import run_operation
from fdl._dtensor import any_dtensor_type
from fdl.tree._checks import check_tensors

SIMPLE = frozenset((FakeTensor, int, float, bool, type(None)))  # arguments that hold no real tensor

watch_prints()
# When an operation fails on fake tensors, torch logs a traceback before it raises.
logging.getLogger("torch._subclasses.fake_tensor").addFilter(
    lambda record: not (_modes.is_tracing() and "failed while attempting to run" in record.msg)
)


class Tracing(TorchDispatchMode):
    """Replaces each real tensor that the traced function closes over by a fake one.

    Otherwise torch would execute some operations on real tensors, in-place ones too.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.fakes: dict[int, FakeTensor] = {}  # by the id of the real tensor
        self.reals: dict[int, Tensor] = {}  # by the id of the fake tensor
        self.leaks = LeakChecker()
        self.decompose = True  # False: record operations that have derivatives and vmap rules
        self.tracers: list[Any] = []  # of the graphs being traced, innermost last
        self.unroll = True  # several steps of a tiny loop body at each turn
        self.several_steps = False  # a loop was unrolled like that
        self.unrolled: list[tuple[int, str]] = []  # see Traced
        self.substitutes: list[Any] = []  # of the bodies being traced (`_closed_body.py`)

    def fake(self, leaf: Tensor) -> FakeTensor:
        if isinstance(leaf, FakeTensor):
            return leaf
        if id(leaf) not in self.fakes:
            with _disable_current_modes():
                (plain_leaf,) = resolved([leaf])  # as it is passed to the program
                fake = fake_like(self.mode, plain_leaf)
            self.fakes[id(leaf)], self.reals[id(fake)] = fake, leaf
        return self.fakes[id(leaf)]

    def substitute(self, x: Tensor, inside: bool | None = None) -> Tensor:
        """Return the plain tensor that stands for `x` in the loop bodies that are being traced."""
        for substitutes in reversed(self.substitutes):
            substitutes.refuse_no_grad()
            x = substitutes.replace(x, _modes.in_transform() if inside is None else inside)
        return x

    def count_substitutes(self) -> int:
        """Return how many tensors from outside have been replaced in these bodies so far."""
        return sum(len(substitutes.originals) for substitutes in self.substitutes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any_dtensor_type(types):
            return NotImplemented  # DTensor then dispatches on its local tensors
        kwargs = kwargs or {}
        check_draw(func, args, kwargs)
        if func not in LITERAL:
            if kwargs or not SIMPLE.issuperset(map(type, args)):
                args, kwargs = pytree.tree_map_only(Tensor, self.fake, (args, kwargs))
            checked = check_divisor(func, check_indices(func, args)) if self.decompose else args
            result = run_operation(func, checked, kwargs)
            check_dtypes(func, args, kwargs, result)
        else:
            result = func(*args, **kwargs)
        self.leaks.note(result, func)
        return result


class Traced(NamedTuple):
    """The graph of a function, for one signature of its arguments."""

    graph: GraphModule  # (*leaves, *constants) -> list of results
    mode: FakeTensorMode  # of the fake tensors in the graph
    constants: list[Tensor]  # closed-over tensors, read at each call
    results: list[FakeTensor]
    spec: Hashable  # of the result
    unrolled: list[tuple[int, str]]  # steps of a scan that is not a loop, and why
    several_steps: bool  # a loop runs several steps at each turn


def current_trace() -> Tracing:
    """Return the tracer of the function that `jit` is tracing."""
    return cast(Tracing, _modes.tracing.get())


def to_fake(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Replace real tensors by fake ones in the current trace: they are closed over."""
    return [current_trace().fake(leaf) for leaf in leaves]


def proxy_node(x: Tensor) -> Node | None:
    """Return the node that computes a fake tensor in the graph that is being traced now."""
    proxy: Any = get_proxy_slot(x, current_trace().tracers[-1], None)
    return None if proxy is None else cast(Node, proxy.proxy.node)


def plain(leaf: Tensor, axes: int = 0) -> Tensor:
    """Make a fake tensor like one that may be wrapped, without its first `axes` axes."""
    shape = leaf.shape[axes:]
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        current_trace().mode,
    ):
        return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)


def trace(
    fn: Callable[..., Any], leaves: Sequence[Tensor], spec: Hashable, unroll: bool = True
) -> Traced:
    """Trace `fn` for arguments with the structure `spec` and the signature of `leaves`.

    No result shares memory with an argument, a constant or another result. Without `unroll`, a
    loop runs one step at each turn, however small its body.

    Raises:
        TypeError: the result holds a leaf that is not a tensor.
        ValueError: `fn` changes a tensor in place that it did not create.
    """
    with deferred_imports():
        return _trace(fn, leaves, spec, unroll)


def _trace(
    fn: Callable[..., Any], leaves: Sequence[Tensor], spec: Hashable, unroll: bool
) -> Traced:
    specs: list[Hashable] = []
    mode = fake_mode()
    tracing = Tracing(mode)
    tracing.unroll = unroll

    def flat(*fakes: Tensor) -> list[Tensor]:
        args, kwargs = unflatten(list(fakes), spec)
        result = fn(*args, **kwargs)
        results, out_spec = flatten(result)
        check_tensors(results, result, "jit: every leaf of the result")
        specs.append(out_spec)
        results = to_fake(results)
        return copy_aliases(results, [*fakes, *tracing.fakes.values()])

    name = getattr(fn, "__qualname__", repr(fn))
    token = _modes.tracing.set(tracing)
    try:
        with mode, DynamicIndex():
            fakes = [fake_like(mode, leaf) for leaf in leaves]
            tracing.leaks.note(fakes)
            graph, constants = trace_flat(flat, fakes, argument_names(fn, spec))
        del fakes
        tracing.leaks.check(fn, graph, f"jit: {name}")
    except RuntimeError as error:
        operation = _operation_that_asks(error)
        if operation is None:
            raise
        raise RuntimeError(
            f"jit: {name} asks for the value of a tensor (.item(), if, float, a boolean index), by "
            f"{operation} at {format_line(user_line_of(error))}; while tracing there are no "
            "values: use torch.where, or compute the value outside and close over it"
        ).with_traceback(error.__traceback__) from None
    finally:
        _modes.tracing.reset(token)
    results = [node.meta["val"] for node in results_of(graph.graph)]
    closed_over = [tracing.reals[id(fake)] for fake in constants]
    return Traced(
        graph, mode, closed_over, results, specs[0], tracing.unrolled, tracing.several_steps
    )


def _operation_that_asks(error: RuntimeError) -> Any:
    """Return what asks for values that fake tensors lack, if that is what an error is about."""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return getattr(error.func, "overloadpacket", error.func)
    if "numpy() is not supported for tensor subclasses" in str(error):
        return ".numpy()"
    return "an operation" if "its data is not allocated yet" in str(error) else None


def trace_flat(
    fn: Callable[..., list[Tensor]],
    fakes: Sequence[Tensor],
    names: Sequence[str],
    table: Mapping[Any, Callable[..., Any]] | None = None,
) -> tuple[GraphModule, list[Tensor]]:
    """Trace a function of tensors; the tensors that it closes over become its last arguments.

    In-place operations on tensors that `fn` created are replaced by pure ones.

    Args:
        fn: the function to trace.
        fakes: its arguments, fake tensors.
        names: names of the arguments, used in error messages.
        table: decompositions, instead of those that are needed while a function is traced.

    Returns:
        The graph, and the tensors that `fn` closes over.

    Raises:
        ValueError: `fn` changes a tensor in place that it did not create.
    """
    tracing = current_trace()
    if table is None:
        table = early_decompositions() if tracing.decompose else FIXED_SHAPES

    def traced(*fakes: Tensor) -> list[Tensor]:
        tracing.tracers.append(cast(Any, get_proxy_mode()).tracer)
        try:
            with tracing:
                return to_fake([tracing.substitute(x) for x in fn(*fakes)])
        finally:
            tracing.tracers.pop()

    graph = make_fx(traced, table, _allow_non_fake_inputs=True)(*fakes)
    constants = _lift(graph)
    if any(is_mutable(node) for node in graph.graph.nodes):
        pure = functionalize(graph, remove="mutations")
        # The graph contains the casts, and no function that a mode would have to see.
        with as_written(), torch._C.DisableTorchFunction(), views_in_bodies():
            graph = make_fx(pure, table, _allow_non_fake_inputs=True)(*fakes, *constants)
        constants += _lift(graph)
    graph.graph.eliminate_dead_code()
    check_pure(graph, names)
    for node in nodes_of(graph.graph, "call_function"):
        if node.target is LOOP:
            prune_loop_outputs(graph, node)
    graph.recompile()
    return graph, constants


def trace_again(
    fn: Callable[..., list[Tensor]], fakes: Sequence[Tensor], mode: FakeTensorMode
) -> tuple[GraphModule, list[Tensor]]:
    """Trace a part of a graph, whose indices have been checked, with all decompositions."""
    tracing = Tracing(mode)
    tracing.decompose = False
    token = _modes.tracing.set(tracing)
    try:
        with mode, as_written():
            return trace_flat(fn, fakes, (), decompositions())
    finally:
        _modes.tracing.reset(token)


def trace_part(
    f: Callable[..., Any],
    fn: Callable[..., list[Tensor]],
    arguments: Callable[[], list[Tensor]],
    names: Sequence[str],
    noun: str,
) -> tuple[GraphModule, list[Tensor]]:
    """Trace a part of the traced function, such as the body of a loop, as a graph of its own.

    Args:
        f: the part as the user wrote it, for error messages.
        fn: the same as a function of tensors.
        arguments: makes its arguments, fake tensors.
        names: names of the arguments, used in error messages.
        noun: names the part in error messages.

    Returns:
        The graph, and the tensors that `fn` closes over.

    Raises:
        ValueError: `f` changes a tensor in place that it did not create, or keeps one.
    """
    leaks = current_trace().leaks
    made_before = len(leaks.made)
    with disable_proxy_modes_tracing():
        fakes = arguments()
        leaks.note(fakes)
        graph, closed_over = trace_flat(fn, fakes, names)
    del fakes
    leaks.check(f, graph, noun, made_before)
    return graph, closed_over


def _lift(module: GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds into arguments; numbers stay in it as literals."""
    graph, lifted = module.graph, dict[int, Node]()
    constants: list[Tensor] = []
    arguments = nodes_of(graph, "placeholder")

    def argument(value: Tensor) -> Node:
        (fake,) = to_fake([value])
        if id(fake) not in lifted:
            with (
                graph.inserting_after(arguments[-1])
                if arguments
                else graph.inserting_before(next(iter(graph.nodes)))
            ):
                new = lifted[id(fake)] = graph.placeholder(f"constant{len(arguments)}")
            new.meta["val"] = fake
            arguments.append(new)
            constants.append(fake)
        return lifted[id(fake)]

    def literal(use: Node, value: Tensor) -> Node:
        result = use.meta["val"]
        with _disable_current_modes(), graph.inserting_before(use):
            if value.numel() == 1:
                options = {"dtype": result.dtype, "device": result.device}
                full = (list(result.shape), value.item())
                new = graph.call_function(aten.full.default, full, options)
            else:
                new = graph.call_function(aten.clone.default, (argument(value.to(result.device)),))
            new.meta["val"] = result.clone()  # does not share memory with `value`
        return new

    for node in nodes_of(graph, "get_attr"):
        value = getattr(module, cast(str, node.target))
        if not isinstance(value, Tensor):
            continue  # a loop body
        for use in list(node.users):
            if use.target in LITERAL:
                # If it is moved to another device, create it there: a CUDA graph could not copy it.
                for moved in [user for user in use.users if user.target is MOVE]:
                    moved.replace_all_uses_with(literal(moved, value))
                    graph.erase_node(moved)
                if use.users:
                    use.replace_all_uses_with(literal(use, value))
            else:
                use.replace_input_with(node, argument(value))
    graph.eliminate_dead_code()
    module.recompile()
    return constants


def copy_aliases(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Copy each result that shares memory with an argument or an earlier result."""
    used = {_memory(leaf) for leaf in arguments}
    copied = []
    for leaf in results:
        if _memory(leaf) in used:
            leaf = leaf.clone()
        used.add(_memory(leaf))
        copied.append(leaf)
    return copied


def _memory(leaf: Tensor) -> int:
    return leaf.untyped_storage()._cdata
