"""From a pure Python function to a graph of tensor operations.

The function runs once on fake tensors, which have a form and no values, and each operation on them
is written down (`make_fx`): below `torch.func`, so that `grad` and `vmap` are resolved by then, and
in the primitives that Inductor knows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fdl import _modes
from fdl._compiler._decompositions import decompositions
from fdl._compiler._graph import (
    LITERAL,
    LOOP,
    MOVE,
    _check_pure,
    _forget_unused,
    _is_mutable,
    aten,
    nodes_of,
    results_of,
)
from fdl._compiler._indices import checked
from fdl._compiler._purity import Watch, check_draw
from fdl._compiler._settings import as_written
from fdl._compiler._signature import flatten, paths, unflatten
from fdl._compiler._user_lines import line_of, line_text
from fdl._dtensor import any_dtensor_type
from fdl.tree._checks import check_tensors


class _Tracing(TorchDispatchMode):
    """Puts a fake tensor in the place of each real one that the traced function closes over.

    Without it torch would run some operations on real tensors at once, in-place ones too.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.fakes: dict[int, FakeTensor] = {}  # by the id of the real tensor
        self.reals: dict[int, Tensor] = {}  # by the id of the fake tensor
        self.watch = Watch()

    def fake(self, leaf: Tensor) -> FakeTensor:
        if isinstance(leaf, FakeTensor):
            return leaf
        if id(leaf) not in self.fakes:
            with _disable_current_modes():
                found = _fake_like(self.mode, leaf)
            self.fakes[id(leaf)], self.reals[id(found)] = found, leaf
        return self.fakes[id(leaf)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any_dtensor_type(types):
            return NotImplemented  # come back with the parts of which it is made
        kwargs = kwargs or {}
        check_draw(func, args, kwargs)
        if func not in LITERAL:
            args, kwargs = pytree.tree_map_only(Tensor, self.fake, (args, kwargs))
            args = checked(func, args)
        result = func(*args, **kwargs)
        self.watch.note(result, func)
        return result


class Traced(NamedTuple):
    """A function as a graph, for one form of its arguments."""

    graph: GraphModule  # (*leaves, *constants) -> list of results
    mode: FakeTensorMode  # that of the fake tensors in the graph
    constants: list[Tensor]  # what the function closes over, read at each call
    results: list[FakeTensor]
    spec: Hashable  # of the result


def watch() -> Watch:
    """Return, while tracing, what watches over the tensors that are made."""
    return cast(_Tracing, _modes.tracing.get()).watch


def faked(leaves: Sequence[Tensor]) -> list[Tensor]:
    """While tracing, put fake tensors in the place of real ones, which are closed over."""
    return [cast(_Tracing, _modes.tracing.get()).fake(leaf) for leaf in leaves]


def trace(fn: Callable[..., Any], leaves: Sequence[Tensor], spec: Hashable) -> Traced:
    """Trace `fn`, whose arguments have the structure `spec` and the forms of `leaves`.

    No result shares memory with an argument, a constant or another result.

    Raises:
        TypeError: the result holds a leaf that is not a tensor.
        ValueError: `fn` changes in place what it has not made itself.
    """
    specs: list[Hashable] = []
    # Loops that Inductor emits itself count their steps with a symbol of this environment.
    counting = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=counting, static_shapes=True)
    tracing = _Tracing(mode)

    def flat(*fakes: Tensor) -> list[Tensor]:
        args, kwargs = unflatten(list(fakes), spec)
        result = fn(*args, **kwargs)
        results, out_spec = flatten(result)
        check_tensors(results, result, "jit: every leaf of the result")
        specs.append(out_spec)
        results = faked(results)
        return unshared(results, [*fakes, *tracing.fakes.values()])

    name = getattr(fn, "__qualname__", repr(fn))
    token = _modes.tracing.set(tracing)
    try:
        with mode:
            fakes = [_fake_like(mode, leaf) for leaf in leaves]
            tracing.watch.note(fakes)
            graph, constants = trace_flat(flat, fakes, paths(spec))
        del fakes
        tracing.watch.check(fn, graph, f"jit: {name}")
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        operation = getattr(error.func, "overloadpacket", error.func)
        raise RuntimeError(
            f"jit: {name} asks for the value of a tensor (.item(), if, float, a boolean index, "
            f"x[i] with a 0-d i), by {operation} at {line_text(line_of(error))}; but it is traced, "
            "not run; use torch.where, x[i[None]][0], or compute that value outside and close over "
            "it"
        ) from error
    finally:
        _modes.tracing.reset(token)
    mode.allow_scalar_outputs = True
    results = [node.meta["val"] for node in results_of(graph.graph)]
    closed_over = [tracing.reals[id(fake)] for fake in constants]
    return Traced(graph, mode, closed_over, results, specs[0])


def trace_flat(
    fn: Callable[..., list[Tensor]], fakes: Sequence[Tensor], names: Sequence[str]
) -> tuple[GraphModule, list[Tensor]]:
    """Trace a function of tensors; also give what it closes over, which become its last arguments.

    Operations that change a tensor made by `fn` itself are replaced by ones that make a new one.

    Args:
        fn: what to trace.
        fakes: its arguments.
        names: those of the arguments, for errors.

    Raises:
        ValueError: `fn` changes in place what it has not made itself.
    """

    def watched(*fakes: Tensor) -> list[Tensor]:
        with cast(_Tracing, _modes.tracing.get()):
            return faked(fn(*fakes))

    graph = make_fx(watched, decompositions(), _allow_non_fake_inputs=True)(*fakes)
    constants = _lift(graph)
    if any(_is_mutable(node) for node in graph.graph.nodes):
        pure = functionalize(graph, remove="mutations")
        with as_written():  # what was to be cast is cast by the graph
            graph = make_fx(pure, decompositions(), _allow_non_fake_inputs=True)(*fakes, *constants)
        constants += _lift(graph)
    graph.graph.eliminate_dead_code()
    _check_pure(graph, names)
    for node in nodes_of(graph.graph, "call_function"):
        if node.target is LOOP:
            _forget_unused(graph, node)
    graph.recompile()
    return graph, constants


def _fake_like(mode: FakeTensorMode, leaf: Tensor) -> FakeTensor:
    """Make a fake tensor of the form of a real one, with memory of its own.

    Arguments that share memory are as good as others, since nothing is written to.
    """
    with mode:
        fake = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return cast(FakeTensor, fake)


def _lift(module: GraphModule) -> list[Tensor]:
    """Make arguments of the tensors that a graph holds; numbers are written into it."""
    graph, lifted = module.graph, dict[int, Node]()
    constants: list[Tensor] = []
    arguments = nodes_of(graph, "placeholder")

    def argument(value: Tensor) -> Node:
        (fake,) = faked([value])
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
        made = use.meta["val"]
        with _disable_current_modes(), graph.inserting_before(use):
            if value.numel() == 1:
                form = {"dtype": made.dtype, "device": made.device}
                new = graph.call_function(aten.full.default, (list(made.shape), value.item()), form)
            else:
                new = graph.call_function(aten.clone.default, (argument(value.to(made.device)),))
            new.meta["val"] = made.clone()  # whose memory is not that of `value`
        return new

    for node in nodes_of(graph, "get_attr"):
        value = getattr(module, cast(str, node.target))
        if not isinstance(value, Tensor):
            continue  # the body of a loop
        for use in list(node.users):
            if use.target in LITERAL:
                # On another device it is made right there, since a CUDA graph could not copy it.
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


def unshared(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Copy what shares memory with an argument, a constant or an earlier result."""
    taken = {_memory(leaf) for leaf in arguments}
    own = []
    for leaf in results:
        if _memory(leaf) in taken:
            leaf = leaf.clone()
        taken.add(_memory(leaf))
        own.append(leaf)
    return own


def _memory(leaf: Tensor) -> int:
    return leaf.untyped_storage()._cdata
