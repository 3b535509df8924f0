"""From a pure Python function to a graph of tensor operations.

The function runs once on fake tensors, which have a form and no values, and each operation on them
is written down (`make_fx`): below `torch.func`, so that `grad` and `vmap` are resolved by then, and
in the primitives that Inductor knows.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fdl import tree
from fdl.tree import Tree

__all__ = [
    "LOOP",
    "Traced",
    "check_tensors",
    "is_tracing",
    "nodes_of",
    "results_of",
    "trace",
    "trace_flat",
]

aten = torch.ops.aten
LOOP = torch.ops.higher_order.scan  # the node of a loop: (body, init, xs, constants)
RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])
NEEDS_Y = RELEASE < (2, 12)  # the loop has to put something out
LITERAL = (aten.lift_fresh.default, aten.lift_fresh_copy.default)  # what torch.tensor(1.0) ends in

_tracing: ContextVar[bool] = ContextVar("fdl_tracing", default=False)


class Traced(NamedTuple):
    """A function as a graph, for one form of its arguments."""

    graph: GraphModule  # (*leaves, *constants) -> list of results
    mode: FakeTensorMode  # that of the fake tensors in the graph
    constants: list[Tensor]  # what the function closes over, read at each call
    results: list[FakeTensor]
    spec: pytree.TreeSpec  # of the result


def is_tracing() -> bool:
    """Say whether `jit` is tracing."""
    return _tracing.get()


def trace(fn: Callable[..., Any], leaves: Sequence[Tensor], spec: pytree.TreeSpec) -> Traced:
    """Trace `fn`, whose arguments have the structure `spec` and the forms of `leaves`.

    No result shares memory with an argument, a constant or another result.

    Raises:
        TypeError: the result holds a leaf that is not a tensor.
        ValueError: `fn` changes an argument in place.
    """
    specs: list[pytree.TreeSpec] = []

    def flat(*fakes: Tensor) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(list(fakes), spec)
        result = fn(*args, **kwargs)
        results, out_spec = pytree.tree_flatten(result)
        check_tensors(results, result, "jit: every leaf of the result")
        specs.append(out_spec)
        return unshared(results, fakes)

    # Loops that Inductor emits itself count their steps with a symbol of this environment.
    counting = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=counting, static_shapes=True)
    token = _tracing.set(True)
    try:
        with mode:
            fakes = [mode.from_tensor(leaf.detach()) for leaf in leaves]
            graph, constants = trace_flat(flat, fakes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        error.add_note(
            f"jit: {fn!r} asks for the value of a tensor (.item(), if, float), but is traced, not "
            "run; use torch.where, or compute that value outside and close over it"
        )
        raise
    finally:
        _tracing.reset(token)
    _check_pure(graph, spec)
    mode.allow_scalar_outputs = True
    results = [node.meta["val"] for node in results_of(graph.graph)]
    return Traced(graph, mode, constants, results, specs[0])


def trace_flat(
    fn: Callable[..., list[Tensor]], fakes: Sequence[Tensor]
) -> tuple[GraphModule, list[Tensor]]:
    """Trace a function of tensors; also give what it closes over, which become its last arguments.

    Operations that change a tensor made by `fn` itself are replaced by ones that make a new one.
    """
    graph = make_fx(fn, _decompositions(), _allow_non_fake_inputs=True)(*fakes)
    constants = _lift(graph)
    if any(_is_mutable(node) for node in graph.graph.nodes):
        pure = functionalize(graph, remove="mutations")
        graph = make_fx(pure, _decompositions(), _allow_non_fake_inputs=True)(*fakes, *constants)
        constants += _lift(graph)
    graph.graph.eliminate_dead_code()
    for node in nodes_of(graph.graph, "call_function"):
        if node.target is LOOP:
            _forget_unused(graph, node)
    graph.recompile()
    return graph, constants


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    # A second to import, which those who do not compile save; decompositions look into lowering.
    import torch._inductor.lowering  # noqa: F401
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def _lift(module: GraphModule) -> list[Tensor]:
    """Make arguments of the tensors that a graph holds; numbers are written into it."""
    graph, lifted = module.graph, dict[int, Node]()
    constants: list[Tensor] = []
    arguments = nodes_of(graph, "placeholder")
    for node in nodes_of(graph, "get_attr"):
        value = getattr(module, cast(str, node.target))
        if not isinstance(value, Tensor):
            continue  # the body of a loop
        literal = all(user.target in LITERAL for user in node.users)
        if literal and value.numel() == 1 and not isinstance(value, FakeTensor):
            with unset_fake_temporarily(), graph.inserting_before(node):
                new = graph.call_function(
                    aten.full.default,
                    (list(value.shape), value.item()),
                    {"dtype": value.dtype, "device": value.device},
                )
                new.meta["val"] = next(iter(node.users)).meta["val"]
        elif id(value) in lifted:
            new = lifted[id(value)]
        else:
            with (
                graph.inserting_after(arguments[-1])
                if arguments
                else graph.inserting_before(next(iter(graph.nodes)))
            ):
                new = lifted[id(value)] = graph.placeholder(f"constant{len(arguments)}")
                new.meta["val"] = _fake(value)
            arguments.append(new)
            constants.append(value)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in nodes_of(graph, "call_function"):
        if node.target in LITERAL:
            node.target = aten.clone.default
            node.meta["val"] = cast(Node, node.args[0]).meta["val"].clone()
    module.recompile()
    return constants


def _fake(value: Tensor) -> Tensor:
    if isinstance(value, FakeTensor):
        return value
    return cast(FakeTensorMode, detect_fake_mode()).from_tensor(value.detach())


def _forget_unused(module: GraphModule, loop: Node) -> None:
    """Take from the body of a loop what nobody reads: metrics, say, where only the state counts."""
    reference, init, *_ = cast(Any, loop.args)
    body = cast(GraphModule, module.get_submodule(reference.target))
    results = results_of(body.graph)
    read = {cast(int, user.args[1]): user for user in loop.users}
    kept = [i for i in range(len(results)) if i < len(init) or i in read]
    if NEEDS_Y and len(kept) == len(init):
        kept.append(len(init))
    (output,) = nodes_of(body.graph, "output")
    output.args = ([results[i] for i in kept],)
    body.graph.eliminate_dead_code()
    body.recompile()
    for new, old in enumerate(kept):
        if old in read:
            read[old].args = (loop, new)
    loop.meta["val"] = tuple(loop.meta["val"][i] for i in kept)


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _check_pure(graph: GraphModule, spec: pytree.TreeSpec) -> None:
    """Raise if an argument or a closed-over tensor is changed; all else is pure by now."""
    whole = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [tree.dotted(path) for path, _ in pytree.tree_flatten_with_path(whole)[0]]
    arguments = nodes_of(graph.graph, "placeholder")
    names = dict(zip(arguments, paths, strict=False))
    changed = [
        names.get(cast(Node, node.args[0]), "a closed-over tensor")
        for node in graph.graph.nodes
        if _is_mutable(node)
    ]
    if changed:
        raise ValueError(
            f"jit: the function changes {', '.join(changed)} in place; a jitted function must be "
            "pure: compute a new tensor and return it"
        )


def unshared(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """Copy what shares memory with an argument, a constant or an earlier result."""
    taken = {_memory(leaf) for leaf in arguments}
    own = []
    for leaf in results:
        closed_over = is_tracing() and not isinstance(leaf, FakeTensor)
        if closed_over or _memory(leaf) in taken:
            leaf = leaf.clone()
        taken.add(_memory(leaf))
        own.append(leaf)
    return own


def _memory(leaf: Tensor) -> int:
    return leaf.untyped_storage()._cdata


def nodes_of(graph: Graph, op: str) -> list[Node]:
    """List the nodes of one kind, in order."""
    return [node for node in graph.nodes if node.op == op]


def results_of(graph: Graph) -> list[Node]:
    """List what a graph returns."""
    (output,) = nodes_of(graph, "output")
    return cast(list[Node], list(cast(Any, output.args[0])))


def check_tensors(leaves: Sequence[Any], whole: Tree, what: str) -> None:
    """Raise unless every one of `leaves`, those of `whole`, is a tensor; `what` names the whole."""
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return
    pairs, _ = pytree.tree_flatten_with_path(whole)
    found = [f"{tree.dotted(p)}: {leaf!r}" for p, leaf in pairs if not isinstance(leaf, Tensor)]
    raise TypeError(
        f"{what} must be a tensor; wrap numbers in torch.tensor, close over what is constant. "
        "Not tensors:\n  " + "\n  ".join(found)
    )
