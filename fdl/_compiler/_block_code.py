"""C++ of a region: its operations on one block of images after the other (`blocks/*.h`).

The axis of images is the innermost one, and a block has as many images as a vector holds numbers.
A thread computes everything for one block before it turns to the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isinf, isnan, prod
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from fdl._compiler._block_axes import MAPS, Axis, Shape, shape_of
from fdl._compiler._graph import literal, value_of

MEMORY = re.compile(r"\bm\d+\b")  # names of memory of a thread


class Place(NamedTuple):
    """Where the numbers of a block are; sizes and strides count vectors."""

    pointer: str
    shape: Shape
    strides: Shape
    start: int = 0

    def is_contiguous(self) -> bool:
        strides = zip(self.shape, self.strides, strides_of(self.shape), strict=True)
        return all(a == b for n, a, b in strides if n > 1)


def strides_of(shape: Shape) -> Shape:
    """Return the strides of a contiguous array.

    >>> strides_of((6, 28, 28))
    (784, 28, 1)
    """
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def strides_after(shape: Shape, strides: Shape, after: Shape) -> Shape | None:
    """Return the strides of an array in another shape; None if its numbers have to be moved.

    >>> strides_after((24, 3, 32), (96, 32, 1), (24, 3, 4, 8))
    (96, 32, 8, 1)
    >>> strides_after((4, 24), (1, 4), (96,))
    """
    parts: list[tuple[int, int]] = []  # of the shape, with axes that follow each other as one
    for n, stride in zip(shape, strides, strict=True):
        if n > 1 and parts and parts[-1][1] == n * stride:
            parts[-1] = parts[-1][0] * n, stride
        elif n > 1:
            parts.append((n, stride))
    new: list[int] = []
    left, stride = 1, 0
    for n in reversed(after):
        if n > 1 and left == 1:
            left, stride = parts.pop()
        if left % n:
            return None
        new.append(stride)
        left, stride = left // n, stride * n
    return tuple(reversed(new))


def whole(pointer: str, shape: Shape, start: int = 0) -> Place:
    """Return the place of a contiguous array."""
    return Place(pointer, shape, strides_of(shape), start)


def axis_of(node: Any) -> Axis | None:
    """Return where the images of a value are, if it has any."""
    return cast(Axis | None, node.meta.get("images"))


def keeps_axis(node: Node) -> bool:
    """Check that the axis of images of the first argument is also one of the result."""
    x = cast(Node, node.args[0])
    axis = axis_of(x)
    there, _ = MAPS[node.target](node, x)
    return axis is not None and axis_of(node) is not None and there(axis) == axis_of(node)


def rest(node: Node) -> Shape:
    """Return the shape of a value in a block, without its images.

    The axis of images has what it has besides: the members of a population, or tokens, or one.
    """
    shape, axis = shape_of(node), cast(Axis, axis_of(node))
    return (*shape[: axis.axis], axis.others(), *shape[axis.axis + 1 :])


@dataclass
class Block:
    """The code of a region, as it is written."""

    width: int  # images of a block
    registers: int  # vectors that the processor holds
    number: str  # C++ type of the numbers
    shared: dict[Node, str]  # names of tensors that are the same for all images
    places: dict[Node, Place] = field(default_factory=dict)
    steps: list[list[str]] = field(default_factory=list)  # lines of code
    sizes: dict[str, int] = field(default_factory=dict)  # of memory of a thread, in vectors
    packs: list[str] = field(default_factory=list)  # run once, before the blocks
    packed: int = 0  # numbers that they write
    totals: int = 0  # numbers that a thread sums up over its blocks
    ends: list[str] = field(default_factory=list)  # run once, after the blocks
    written: set[Node] = field(default_factory=set)  # by a step of their own
    given: dict[Node, str] = field(default_factory=dict)  # memory outside for a result
    frames: dict[Any, str] = field(default_factory=dict)

    def buffer(self, size: int, node: Node | None = None) -> str:
        """Return the name of memory for so many vectors."""
        if node in self.given:
            return self.given[node]
        name = f"m{len(self.sizes)}"
        self.sizes[name] = size
        return name

    def step(self, *lines: str) -> None:
        """Add a step."""
        self.steps.append(list(lines))

    def new(self, node: Node) -> Place:
        """Return memory for the value of a node."""
        shape = rest(node)
        self.places[node] = whole(self.buffer(prod(shape), node), shape)
        return self.places[node]

    def pointer(self, node: Node) -> str:
        """Return the address of a value as a contiguous array."""
        place = self.place(node)
        if not place.is_contiguous():
            place = self.copy(place)
            self.places[node] = place
        return address(place)

    def copy(self, place: Place, to: Place | None = None) -> Place:
        if to is None:
            to = whole(self.buffer(prod(place.shape)), place.shape)
        i = indices(place.shape)
        self.step(*loops(place.shape, [f"store({element(to, i)}, load({element(place, i)}));"]))
        return to

    def place(self, node: Node) -> Place:
        """Return where a value is, which is computed now if it was not."""
        if node not in self.places and name_of(node) in COPIES:
            self.places[node] = self.place(operands(node)[0])
        if node not in self.places:
            code, i = Expressions(self), indices(rest(node))
            value = code.value(node, i, top=True)
            if is_mask(node):
                value = f"select<T>({value}, splat(T(1)), V{{}})"
            place = self.new(node)
            self.step(*loops(place.shape, [*code.lines, f"store({element(place, i)}, {value});"]))
        return self.places[node]

    def frame(self, node: Node, rows: int, columns: int, before: int, width: int) -> str:
        """Return the address of rows with zeros before and after them, of so many in all."""
        if (before, width) == (0, columns):
            return self.pointer(node)
        key = node, before, width
        if key not in self.frames:
            source = self.pointer(node)
            name = self.frames[key] = self.buffer(rows * width)
            self.step(f"frame<T, {rows}, {columns}, {before}, {width}>({source}, {name});")
        return self.frames[key]

    def pack(self, kind: str, shape: str, tile: int, weight: Node) -> str:
        """Return the address of weights in the order in which they are read."""
        numbers = value_of(weight).numel()
        start, self.packed = self.packed, self.packed + numbers
        self.packs.append(f"{kind}<T, {shape}, {tile}>({self.shared[weight]}, packed + {start});")
        return f"packed + {start}"

    def total(self, numbers: int) -> str:
        """Return the address of numbers that a thread sums up over its blocks."""
        start, self.totals = self.totals, self.totals + numbers
        return f"totals + {start}"

    def memory(self) -> tuple[list[str], int]:
        """Divide a thread's memory: values whose times do not overlap share it."""
        last: dict[str, int] = {}
        first: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            for name in set(MEMORY.findall("\n".join(step))):
                first.setdefault(name, i)
                last[name] = i
        placed: list[tuple[int, int, str]] = []  # start, end, name
        for name in sorted(first, key=lambda z: (first[z], -self.sizes[z])):
            size, start = self.sizes[name], 0
            for begin, end, other in sorted(placed):
                if first[other] <= last[name] and first[name] <= last[other]:
                    if begin >= start + size:
                        break
                    start = max(start, end)
            placed.append((start, start + size, name))
        lines = [f"T* const {name} = memory + {start} * L;" for start, _, name in placed]
        return lines, max((end for _, end, _ in placed), default=0)


def address(place: Place) -> str:
    return f"{place.pointer} + {place.start} * L" if place.start else place.pointer


def indices(shape: Shape) -> list[str]:
    return [f"i{axis}" for axis in range(len(shape))]


def offset(place: Place, index: Sequence[str]) -> str:
    """Write how many vectors lie before one."""
    terms = [
        i if stride == 1 else f"{stride} * {i}"
        for i, stride, size in zip(index, place.strides, place.shape, strict=True)
        if stride and size > 1 and i != "0"
    ]
    terms += [str(place.start)] if place.start else []
    return f"({' + '.join(terms) or 0})"


def element(place: Place, index: Sequence[str]) -> str:
    """Write the address of a vector."""
    return f"{place.pointer} + {offset(place, index)} * L"


def loops(shape: Shape, body: Sequence[str]) -> list[str]:
    """Write loops of i0, i1 and so on over all axes."""
    heads = [f"for (int64_t i{k} = 0; i{k} < {n}; ++i{k}) {{" for k, n in enumerate(shape)]
    return [*heads, *body, "}" * len(heads)]


UNARY: dict[str, str] = {
    "neg": "(-{0})",
    "relu": "relu<T>({0})",
    "abs": "absolute({0})",
    "exp": "exponential({0})",
    "log": "logarithm({0})",
    "erf": "error_function({0})",
    "sigmoid": "sigmoid<T>({0})",
    "tanh": "hyperbolic_tangent({0})",
    "sqrt": "squareroot({0})",
    "rsqrt": "(T(1) / squareroot({0}))",
    "reciprocal": "(T(1) / {0})",
    "logical_not": "(~{0})",
    "bitwise_not": "(~{0})",
    "clone": "{0}",
    "alias": "{0}",
    "lift_fresh_copy": "{0}",
}
BINARY: dict[str, str] = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "maximum": "maximum<T>({0}, {1})",
    "minimum": "minimum<T>({0}, {1})",
    "le": "({0} <= {1})",
    "lt": "({0} < {1})",
    "ge": "({0} >= {1})",
    "gt": "({0} > {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "logical_and": "({0} & {1})",
    "logical_or": "({0} | {1})",
    "bitwise_and": "({0} & {1})",
    "bitwise_or": "({0} | {1})",
}
MASKS = {"logical_not", "bitwise_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or"}
COMPARISONS = {"le", "lt", "ge", "gt", "eq", "ne"}
COPIES = {"clone", "alias", "lift_fresh_copy"}
FUNCTIONS = {"exp", "log", "erf", "sigmoid", "tanh"}
SLOW = {*FUNCTIONS, "div", "sqrt", "rsqrt"}
ELEMENTWISE: dict[Any, str] = {}
for _name, _text in {**UNARY, **BINARY, "where": "select<T>({0}, {1}, {2})"}.items():
    for _overload in ("default", "Tensor", "Scalar", "self"):
        _target = getattr(getattr(torch.ops.aten, _name), _overload, None)
        if _target is not None and "Tensor" in str(_target._schema.arguments[0].type):
            ELEMENTWISE[_target] = _text


FMA = "prims.fma.default"  # Inductor's, which exists only once it is imported
CONVERT = torch.ops.prims.convert_element_type.default  # of a mask to numbers
ELEMENTWISE[CONVERT] = "select<T>({0}, splat(T(1)), V{{}})"


def expression_of(node: Node) -> str | None:
    """Return C++ of an elementwise operation on vectors {0}, {1} and {2}, if it is one."""
    return "fma({0}, {1}, {2})" if str(node.target) == FMA else ELEMENTWISE.get(node.target)


def operands(node: Node) -> list[Any]:
    """List the arguments of an elementwise operation that are values."""
    return [x for x in node.args if isinstance(x, Node | bool | int | float)]


def name_of(node: Node) -> str:
    """Return the name of an operation without its overload."""
    return getattr(node.target, "__name__", "").split(".")[0]


def is_mask(x: Any) -> bool:
    """Check for a tensor of bools that is not filled with one number."""
    return isinstance(x, Node) and literal(x) is None and value_of(x).dtype is torch.bool


def number(x: Any) -> str:
    """Write a number as C++."""
    if isnan(x):
        return "T(NAN)"
    if isinf(x):
        return "T(INFINITY)" if x > 0 else "T(-INFINITY)"
    return f"T({float(x)!r})"


class Expressions:
    """The lines of a loop's body that compute values at one pixel."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.lines: list[str] = []
        self.names: dict[Any, str] = {}

    def value(self, x: Any, index: Sequence[str], top: bool = False) -> str:
        """Return the name of a vector: of an operand at an index."""
        filled = literal(x)
        if filled is not None:
            return f"splat({number(filled)})"
        node = cast(Node, x)
        if node in self.block.shared:
            return self._shared(node, index)
        index = [i if n > 1 else "0" for i, n in zip(index, rest(node), strict=True)]
        key = node, tuple(index)
        if key not in self.names:
            text = self._text(node, index, top)
            self.names[key] = f"v{len(self.names)}"
            self.lines.append(f"const auto {self.names[key]} = {text};")
        return self.names[key]

    def _text(self, node: Node, index: Sequence[str], top: bool) -> str:
        if not top and (node in self.block.written or node in self.block.places):
            place = self.block.place(node)
            loaded = f"load({element(place, index)})"
            return f"({loaded} != T(0))" if is_mask(node) else loaded
        values = [self.value(x, index) for x in operands(node)]
        return cast(str, expression_of(node)).format(*values)

    def _shared(self, node: Node, index: Sequence[str]) -> str:
        shape = tuple(value_of(node).shape)
        strides = strides_of(shape)
        used = index[len(index) - len(shape) :]
        terms = [
            i if stride == 1 else f"{stride} * {i}"
            for i, stride, n in zip(used, strides, shape, strict=True)
            if n > 1
        ]
        return f"splat(T({self.block.shared[node]}[{' + '.join(terms) or 0}]))"
