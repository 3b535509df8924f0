"""Index checks in a compiled program: those of eager torch, done before the index is used.

Inductor checks an index only where a kernel loads with it. So labels out of range would train
silently if only the derivative is computed, which compares them (`_passes.py`); operations that
refuse negative indices in eager torch (`index_select`, `index_add`) would accept them once they are
decomposed; and an error inside a multithreaded kernel aborts the process. Therefore each index of
an operation passes through `in_range` while the function is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

OUT_OF_RANGE = "index out of range: expected"  # beginning of the error message


class _Index(NamedTuple):
    """Which argument of an operation is an index, and its range: `low` <= index < `high`."""

    position: int
    low: int
    high: int
    ignored: int | None = None  # a label that may be out of range


_Args = Sequence[Any]


def _along(args: _Args) -> Iterator[_Index]:
    """`(x, dim, index, …)`, without negative indices."""
    x, dim = args[:2]
    yield _Index(2, 0, x.shape[dim] if x.ndim else 1)


def _along_from_the_end(args: _Args) -> Iterator[_Index]:
    for index in _along(args):
        yield index._replace(low=-index.high)


def _flat(args: _Args) -> Iterator[_Index]:
    """`(x, index, …)`, into the flattened `x`; negative indices count from the end."""
    yield _Index(1, -args[0].numel(), args[0].numel())


def _rows(args: _Args) -> Iterator[_Index]:
    """`(weight, index, …)`."""
    yield _Index(1, 0, args[0].shape[0])


def _rows_of_derivative(args: _Args) -> Iterator[_Index]:
    """`(grad, index, rows, …)`."""
    yield _Index(1, 0, args[2])


def _labels(args: _Args) -> Iterator[_Index]:
    """`(log_p, labels, weight, reduction, ignored)`, classes along axis 1, or the only axis."""
    yield _Index(1, 0, args[0].shape[1 if args[0].ndim > 1 else 0], args[4])


def _labels_of_derivative(args: _Args) -> Iterator[_Index]:
    """`(grad, log_p, labels, weight, reduction, ignored, …)`."""
    for index in _labels(args[1:]):
        yield index._replace(position=2)


def _classes(args: _Args, low: int = 0) -> Iterator[_Index]:
    """`(x, labels, …)`, classes along the last axis; a `low` of −1 ends a set of labels."""
    yield _Index(1, low, args[0].shape[-1] if args[0].ndim else 1)


def _unpooled(args: _Args) -> Iterator[_Index]:
    """`(x, index, sizes, …)`, into the flattened pixels of an image."""
    yield _Index(1, 0, torch.Size(args[2]).numel())


def _bins(args: _Args) -> Iterator[_Index]:
    """`(index, weights, minlength)` of `bincount`, which has `minlength` bins in a program."""
    if len(args) > 2 and args[2]:
        yield _Index(0, 0, args[2])


# By the name of the operation, without the _ of in-place variants.
RULES: dict[str, Callable[[_Args], Iterator[_Index]]] = {
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_reduce"), _along),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_reduce"), _along),
    "index_fill": _along_from_the_end,
    **dict.fromkeys(("take", "put"), _flat),
    "embedding": _rows,
    "embedding_dense_backward": _rows_of_derivative,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _labels),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _labels_of_derivative),
    "multi_margin_loss": _classes,
    "multilabel_margin_loss_forward": partial(_classes, low=-1),
    "bincount": _bins,
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), _unpooled),
}
LISTS = ("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put")


def check_indices(op: Any, args: _Args) -> _Args:
    """Replace the indices among the arguments of an operation by checked ones."""
    name = getattr(op, "_opname", "").removesuffix("_")
    if name not in RULES and name not in LISTS:
        return args
    if any(isinstance(z, Tensor) and z.is_cuda for z in args):
        return args  # kernels check; nothing else could stop the program
    new = list(args)
    if name in LISTS:  # `(x, indices, …)`: one for each of the first axes, None for a whole axis
        sizes = zip(args[1], args[0].shape, strict=False)
        if all(_is_integer(index) for index in args[1] if index is not None):
            new[1] = [None if z is None else _checked(z, -size, size) for z, size in sizes]
    else:
        for i, low, high, ignored in RULES[name](args):
            index = args[i]
            if ignored is not None and index.dtype == torch.uint8:
                index = index.long()  # labels may be bytes, but Inductor's decomposition fails
            if ignored is None or ignored in range(low, high):
                new[i] = _checked(index, low, high)
            else:
                is_ignored = index == ignored
                checked = _checked(torch.where(is_ignored, low, index), low, high)
                new[i] = torch.where(is_ignored, ignored, checked)
    return new


def _checked(index: Tensor, low: int, high: int) -> Tensor:
    if index.numel() and low == high:  # the range is empty
        raise IndexError(range_error(low, high))
    return in_range(index, low, high)


def _is_integer(index: Tensor) -> bool:
    return index.dtype in (torch.int64, torch.int32)  # not a mask


@torch.library.custom_op("fdl::in_range", mutates_args=())
def in_range(index: Tensor, low: int, high: int) -> Tensor:
    """Return a copy of `index`; raise unless `low` <= index < `high` for all elements."""
    if not is_in_range(index, low, high):
        raise IndexError(range_error(low, high))
    return index.clone()


@in_range.register_fake
def _(index: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(index)


def range_error(low: int, high: int) -> str:
    """Return the error message for an index out of range."""
    return f"{OUT_OF_RANGE} {low} <= index < {high}"


IN_RANGE = in_range._opoverload
SAME_ELEMENTS = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.permute.default,
)


def drop_checks(graph: Graph, check: Any, passes: Callable[..., bool]) -> None:
    """Remove the calls of a check that have been made before, and those that a constant passes.

    Args:
        graph: the graph, which is changed.
        check: an operation that returns its first argument.
        passes: whether it does so for these arguments.
    """
    for node in graph.find_nodes(op="call_function", target=check):
        checked, *rest = cast(Any, node.args)
        # A loop body is traced a second time, with the checks that it already has.
        repeated = checked.target is check and list(checked.args[1:]) == rest
        constant = None if repeated else _constant_value(checked)
        if repeated or (constant is not None and passes(constant, *rest)):
            node.replace_all_uses_with(checked)
            graph.erase_node(node)


LARGEST = 2**16  # elements of a constant that is computed to be checked


def is_in_range(index: Tensor, low: int, high: int) -> bool:
    """Check all elements of an index."""
    return bool(((index >= low) & (index < high)).all())


def _constant_value(of: Node) -> Tensor | None:
    """Compute a value that depends on no argument, such as the rows in `x[arange(n), labels]`."""
    chain, rest = {of}, [of]
    while rest:
        node = rest.pop()
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or value.numel() > LARGEST:
            return None
        rest += set(node.all_input_nodes) - chain
        chain.update(node.all_input_nodes)
    values: dict[Node, Any] = {}
    with _disable_current_modes():
        for node in sorted(chain):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = cast(Any, node.target)(*args, **kwargs)
    return cast(Tensor, values[of])


def hoist_checks(loop: Node, body: Graph) -> None:
    """Check indices in the xs of a loop once before the loop, instead of row by row."""
    _, init, xs, _ = cast(Any, loop.args[:4])
    rows = body.find_nodes(op="placeholder")[len(init) : len(init) + len(xs)]
    for i, row in enumerate(rows):
        for low, high in _ranges_of_all(row, body):
            with loop.graph.inserting_before(loop):
                all_rows = loop.graph.call_function(IN_RANGE, (xs[i], low, high))
            all_rows.meta["val"] = xs[i].meta["val"].clone()
            xs = [*xs[:i], all_rows, *xs[i + 1 :]]
            loop.args = (loop.args[0], init, xs, *loop.args[3:])


def _ranges_of_all(row: Node, body: Graph) -> list[tuple[int, int]]:
    """Remove the checks that cover a whole row from a loop body, and list their ranges."""
    checks: dict[tuple[int, int], dict[int | None, list[Node]]] = {}
    for node in body.find_nodes(op="call_function", target=IN_RANGE):
        index, low, high = cast(Any, node.args)
        origin, part = _origin(index)
        if origin is row:
            checks.setdefault((low, high), {}).setdefault(part, []).append(node)
    ranges = []
    for (low, high), parts in checks.items():
        # Unrolled steps check one part each.
        if None in parts or len(parts) == len(row.meta["val"]):
            ranges.append((low, high))
            for node in [node for nodes in parts.values() for node in nodes]:
                node.replace_all_uses_with(cast(Node, node.args[0]))
                body.erase_node(node)
    return ranges


def _origin(index: Node) -> tuple[Node, int | None]:
    """Return the node whose elements `index` has, and which part of it `index` is, or None."""
    while index.target in SAME_ELEMENTS:
        index = cast(Node, index.args[0])
    if index.target is aten.select.int and index.args[1] == 0:
        return cast(tuple[Node, int], (index.args[0], index.args[2]))
    return index, None
