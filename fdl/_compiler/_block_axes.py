"""Find the axis of images of each value around convolutions.

In a population, by `vmap`, it is not always the first: activations are `[members, images, …]`, or
`[members · images, …]` for a pooling, or `[images, members · channels, …]` for a convolution in
groups. Products have activations of sequences as `[images · tokens, features]`, and those of heads
as `[images · heads, tokens, features]`. In a block, each of them is an array whose axis of images
has no more than what it had besides the images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fdl._compiler._graph import VIEWS, literal, value_of

aten = torch.ops.aten
Shape = tuple[int, ...]
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
SUMS = (aten.sum.dim_IntList, aten.mean.dim)
MOMENTS = aten.var_mean.correction
# Inductor's, which exist only once it is imported.
MAX_POOL = "prims._low_memory_max_pool_with_offsets.default"
TO_INDICES = "prims._low_memory_max_pool_offsets_to_indices.default"


class Axis(NamedTuple):
    """Where the images of a value are."""

    images: int
    axis: int = 0
    members: int = 1  # that the axis has too, outside of the images
    inner: int = 1  # tokens, say, that the axis has too, inside of the images

    def others(self) -> int:
        """Return the size of the axis without the images."""
        return self.members * self.inner


Map = Callable[[Axis], Axis | None]


class Link(NamedTuple):
    """How the axis of one value determines that of another, and the other way round."""

    source: Node
    target: Node
    there: Map
    back: Map


def shape_of(x: Any) -> Shape:
    """Return the shape of a value."""
    return tuple(value_of(x).shape)


def find_axes(graph: Graph, is_elementwise: Callable[[Node], bool]) -> dict[Node, Axis]:
    """Return the axis of images of the values that are linked with a convolution or a product."""
    links: dict[Node, list[Link]] = defaultdict(list)
    axes: dict[Node, Axis] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for link in links_of(node, is_elementwise(node)):
                links[link.source].append(link)
                links[link.target].append(link)
    for node in graph.nodes:
        if node.target in CONVOLUTIONS:
            _spread(_around_convolution(node), links, axes)
    for node in graph.nodes:
        sequences = sequences_of(node)
        if sequences is not None and sequences not in axes:
            _spread([sequences], links, axes)
    return axes


def _around_convolution(node: Node) -> list[Node]:
    """List the activations that a convolution reads and writes."""
    backward = node.target is aten.convolution_backward.default
    output = result(node, 0) if backward else node
    return [*cast(list[Node], list(node.args[: 1 + backward])), *([output] if output else [])]


def sequences_of(node: Node) -> Node | None:
    """Return the activations `[images, …, features]` that a product reads as rows."""
    rows = node.args[-2] if node.target in PRODUCTS[:2] else None
    if not isinstance(rows, Node) or rows.target not in VIEWS:
        return None
    x = cast(Node, rows.args[0])
    return x if value_of(x).ndim > 2 and shape_of(x)[-1:] == shape_of(rows)[-1:] else None


def _spread(values: list[Node], links: dict[Node, list[Link]], axes: dict[Node, Axis]) -> None:
    """Start from activations whose first axis has the images, and follow the links."""
    images = shape_of(values[0])[0]
    if images <= 1:  # 0 in an empty batch
        return
    for value in values:
        axes.setdefault(value, Axis(images))
    todo = list(values)
    while todo:
        value = todo.pop()
        for link in links.get(value, ()):
            other, map_to = (
                (link.target, link.there) if value is link.source else (link.source, link.back)
            )
            axis = map_to(axes[value])
            if axis is not None and other not in axes and _has(other, axis):
                axes[other] = axis
                todo.append(other)


def _has(node: Node, axis: Axis) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return str(node.target) == MAX_POOL
    size = value.shape[axis.axis] if axis.axis < value.ndim else 0
    return bool(size == axis.images * axis.others())


def result(node: Node, i: int) -> Node | None:
    """Return the node of the i-th result of an operation."""
    return next((user for user in node.users if user.target is getitem and user.args[1] == i), None)


def same(axis: Axis) -> Axis | None:
    return axis


def links_of(node: Node, elementwise: bool) -> Iterator[Link]:
    """Yield the links between a node and its inputs."""
    target = node.target
    name = str(target)
    found = max_pool_backward(node)
    if found is not None:
        yield from (Link(x, node, same, same) for x in (found.grad, found.x))
    elif target is getitem:
        parent = cast(Node, node.args[0])
        if str(parent.target) == MAX_POOL:
            yield Link(parent, node, same, same)
        elif parent.target is MOMENTS:
            x = cast(Node, parent.args[0])
            yield Link(x, node, *reduced(summed(parent), node, x))
    elif elementwise:
        n = value_of(node).ndim
        for x in node.all_input_nodes:
            if isinstance(x.meta.get("val"), Tensor) and value_of(x).ndim == n:
                yield Link(x, node, same, same)
    elif name == MAX_POOL or "aten.avg_pool2d" in name:
        yield Link(cast(Node, node.args[0]), node, same, same)
    elif target is aten.cat.default:
        (dim,) = dims_of(node, value_of(node).ndim)
        for x in cast(list[Node], node.args[0]):
            yield Link(
                x, node, partial(joined, dim, shape_of(node)), partial(joined, dim, shape_of(x))
            )
    elif target in PRODUCTS:
        yield from _of_product(node)
    elif target in MAPS:
        x = cast(Node, node.args[0])
        yield Link(x, node, *MAPS[target](node, x))


def joined(dim: int, shape: Shape, axis: Axis) -> Axis | None:
    """Return the axis of one part for that of another, or of all, which has the shape.

    Batches that are joined are members.
    """
    if axis.axis != dim:
        return axis
    members, left = divmod(shape[dim], axis.images * axis.inner)
    return None if left else axis._replace(members=members)


def _of_product(node: Node) -> Iterator[Link]:
    """Yield the links of `[…, rows, terms] · […, terms, columns]`: the axes but the terms."""
    a, b = cast(list[Node], list(node.args[-2:]))
    rows = value_of(node).ndim - 2
    of_a: Map = lambda axis: axis if axis.axis <= rows else None  # noqa: E731
    of_b: Map = lambda axis: axis if axis.axis != rows else None  # noqa: E731
    yield from (Link(x, node, of, of) for x, of in ((a, of_a), (b, of_b)))


def dims_of(node: Node, n: int) -> list[int]:
    """Return the second argument, an axis or several of n."""
    dims: Any = node.args[1] if len(node.args) > 1 else 0
    return [dim % n for dim in (dims if isinstance(dims, list | tuple) else [dims])]


def _reshape(node: Node, x: Node) -> tuple[Map, Map]:
    before, after = shape_of(x), shape_of(node)
    return partial(reshaped, before, after), partial(reshaped, after, before)


def reshaped(before: Shape, after: Shape, axis: Axis) -> Axis | None:
    """Return where the images are after a reshape, if they are part of one axis then.

    >>> reshaped((4, 256, 6, 28, 28), (1024, 6, 28, 28), Axis(256, 1))
    Axis(images=256, axis=0, members=4, inner=1)
    >>> reshaped((128, 24, 32), (3072, 32), Axis(128))
    Axis(images=128, axis=0, members=1, inner=24)
    """
    outside = prod(before[: axis.axis]) * axis.members
    inside = axis.inner * prod(before[axis.axis + 1 :])
    for k in range(len(after) if prod(after) else 0):
        members, left = divmod(outside, prod(after[:k]))
        inner, left_inside = divmod(inside, prod(after[k + 1 :]))
        if not left and not left_inside:
            return Axis(axis.images, k, members, inner)
    return None


def _permute(node: Node, x: Node) -> tuple[Map, Map]:
    order = [k % value_of(x).ndim for k in cast(Any, node.args[1])]
    return (
        lambda axis: axis._replace(axis=order.index(axis.axis)),
        lambda axis: axis._replace(axis=order[axis.axis]),
    )


def _unsqueeze(node: Node, x: Node) -> tuple[Map, Map]:
    (dim,) = dims_of(node, value_of(node).ndim)
    return _inverse(_removed([dim])), _removed([dim])


def _squeeze(node: Node, x: Node) -> tuple[Map, Map]:
    gone = [dim for dim in dims_of(node, value_of(x).ndim) if shape_of(x)[dim] == 1]
    return _removed(gone), _inverse(_removed(gone))


def _sum(node: Node, x: Node) -> tuple[Map, Map]:
    return reduced(summed(node), node, x)


def reduced(dims: list[int], result: Node, x: Node) -> tuple[Map, Map]:
    """Return the maps between a value and what remains of it after a reduction of some axes."""
    if value_of(result).ndim == value_of(x).ndim:
        keep: Map = lambda axis: None if axis.axis in dims else axis  # noqa: E731
        return keep, keep
    return _removed(dims), _inverse(_removed(dims))


def _expand(node: Node, x: Node) -> tuple[Map, Map]:
    more = value_of(node).ndim - value_of(x).ndim
    return (
        lambda axis: axis._replace(axis=axis.axis + more),
        lambda axis: axis._replace(axis=axis.axis - more) if axis.axis >= more else None,
    )


def _slice(node: Node, x: Node) -> tuple[Map, Map]:
    (dim,) = dims_of(node, value_of(node).ndim)
    keep: Map = lambda axis: None if axis.axis == dim else axis  # noqa: E731
    return keep, keep


def _select(node: Node, x: Node) -> tuple[Map, Map]:
    dims = dims_of(node, value_of(x).ndim)
    return _removed(dims), _inverse(_removed(dims))


def _removed(dims: list[int]) -> Map:
    """Return where an axis is once others are gone."""

    def there(axis: Axis) -> Axis | None:
        below = sum(dim < axis.axis for dim in dims)
        return None if axis.axis in dims else axis._replace(axis=axis.axis - below)

    return there


def _inverse(there: Map) -> Map:
    def back(axis: Axis) -> Axis | None:
        for k in range(axis.axis, axis.axis + 8):
            source = axis._replace(axis=k)
            if there(source) == axis:
                return source
        return None

    return back


def summed(node: Node) -> list[int]:
    """Return the axes of a sum, or of another reduction."""
    n = value_of(node.args[0]).ndim  # type: ignore[arg-type]
    axes = cast(Any, node.args[1]) if len(node.args) > 1 else None
    return sorted(axis % n for axis in axes) if axes else list(range(n))


MAPS: dict[Any, Callable[[Node, Node], tuple[Map, Map]]] = {
    **dict.fromkeys(VIEWS, _reshape),
    **dict.fromkeys((*SUMS, aten.amax.default), _sum),
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}


class MaxPoolBackward(NamedTuple):
    """The nodes that give a pixel the gradients of the windows of which it is the maximum."""

    grad: Node
    x: Node
    pool: Node


def max_pool_backward(node: Node) -> MaxPoolBackward | None:
    """Read the pattern `view(scatter(zeros, view(indices), view(grad)))`."""
    scatter = node.args[0] if node.target in VIEWS else None
    if not isinstance(scatter, Node) or len(scatter.users) != 1:
        return None
    if scatter.target not in (aten.scatter_add.default, aten.scatter.src):
        return None
    zeros, dim, index, grads = cast(Any, scatter.args)
    rows = shape_of(index)
    while index.target in VIEWS:
        index = index.args[0]
    if str(index.target) != TO_INDICES or literal(zeros) != 0:
        return None
    offsets = cast(Node, index.args[0])
    source = cast(Node, offsets.args[0])
    if offsets.target is not getitem or str(source.target) != MAX_POOL:
        return None
    out, x = result(source, 0), cast(Node, source.args[0])
    if out is None or shape_of(node) != shape_of(x):
        return None
    _, kernel, *_ = cast(Any, source.args)
    pixels, windows = (prod(shape_of(z)[-len(kernel) :]) for z in (x, out))
    if dim % len(rows) != len(rows) - 1 or (rows[-1], shape_of(zeros)[-1]) != (windows, pixels):
        return None  # an index is the position in one image
    while shape_of(grads) != shape_of(out) and grads.target in VIEWS:
        grads = cast(Node, grads.args[0])
    return MaxPoolBackward(grads, x, source) if shape_of(grads) == shape_of(out) else None
