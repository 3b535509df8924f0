"""One kernel for the same computation on many leaves: `fdl::leafwise_`.

Inductor lowers the computation once, for a vector of any length. The kernel walks over a table with
a row for each leaf: the memory that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module

from fdl._compiler._graph import results_of, value_of
from fdl._compiler._kernels import kernel_that_writes

aten = torch.ops.aten

LENGTH = 1031  # an example; the kernel is for any
WORTH_THREADS = 1 << 19  # numbers read and written, below which one thread is about as fast

torch.library.define(
    "fdl::leafwise_",
    # In the bodies of loops torch refuses lists of written tensors among positional arguments.
    "(str source, bool in_parts, int[] sizes, Tensor[] reads, *, Tensor(a!)[] writes) -> ()",
)


torch.library.register_fake("fdl::leafwise_", lambda *args, writes: None)

LEAFWISE = torch.ops.fdl.leafwise_.default


class Operand(NamedTuple):
    """An argument of a call: an input, a scalar, or the result of an earlier call."""

    kind: Literal["input", "scalar", "call"]
    position: int


class Number(NamedTuple):
    """A Python number; 0.0 and -0.0 differ, as 1 and 1.0 do."""

    kind: type
    text: str

    def value(self) -> Any:
        return self.text == "True" if self.kind is bool else self.kind(self.text)


class Filled(NamedTuple):
    """A tensor filled with a number."""

    number: Number
    dtype: torch.dtype
    has_axis: bool  # of the size of the leaf


class Call(NamedTuple):
    """An operation on leaves, or the sum over a leaf."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class Body(NamedTuple):
    """A computation on leaves of any length."""

    inputs: tuple[torch.dtype, ...]  # as long as the leaf
    scalars: tuple[torch.dtype, ...]
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]  # indices of calls

    def needs(self, call: int) -> set[int]:
        """Return the indices of the inputs that a call depends on."""
        needed: list[set[int]] = []
        for _, args, _ in self.calls[: call + 1]:
            operands = [z for z in args if isinstance(z, Operand)]
            own = {z.position for z in operands if z.kind == "input"}
            needed.append(own.union(*(needed[z.position] for z in operands if z.kind == "call")))
        return needed[call]


@cache
def leaf_source(body: Body) -> str | None:
    """Return a C++ function that computes a part of one leaf; None if it takes several loops.

    `leaf(row, at, n)` computes the numbers from `at` on, n of them; `row` has the addresses of the
    inputs, the scalars and the outputs.
    """
    from torch._inductor import config, metrics
    from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    symbols = ShapeEnv()
    mode = FakeTensorMode(shape_env=symbols)
    module, arguments = _as_graph(body, symbols, mode)
    calls: list[list[str]] = []
    kernels = metrics.generated_kernel_count
    with (
        V.set_debug_handler(DebugContext()),
        config.patch({"cpp_wrapper": False, "cpp.threads": 1, "inplace_buffers": False}),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
    ):
        lowering: Any = GraphLowering(
            module, example_inputs=arguments, shape_env=symbols, is_inference=True
        )
        with V.set_graph_handler(lowering):
            lowering.run(*arguments)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            wrapper = lowering.wrapper_code
            wrapper.generate_kernel_call = lambda _, names, **__: calls.append(names)
            lowering.scheduler.codegen()
            results = lowering.get_output_names()
    metrics.generated_kernel_count = kernels  # this one is written where it is called
    if len(calls) != 1 or len(set(results)) < len(results):
        return None
    (source,) = wrapper.src_to_kernel
    if source.count("for(int64_t x0=") != 1:
        return None  # a second loop would read what the first one has overwritten
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"][1:]
    columns = [*names, *results]
    dtypes = [*body.inputs, *body.scalars]
    outputs = [value_of(node) for node in results_of(module.graph)]
    types = [f"const {DTYPE_TO_CPP[d]}*" for d in dtypes]
    types += [f"{DTYPE_TO_CPP[out.dtype]}*" for out in outputs]
    moves = [True] * len(body.inputs) + [False] * len(body.scalars) + [out.ndim for out in outputs]

    def argument(name: str) -> str:
        if name not in columns:
            return "n"  # the only symbol
        i = columns.index(name)
        return f"static_cast<{types[i]}>(row[{i}])" + " + at" * bool(moves[i])

    if not set(columns) >= {str(name) for name in calls[0]} - {str(arguments[0])}:
        return None  # it needs memory of its own
    kernel = source[source.index('extern "C"') :].replace('extern "C"', "static")
    kernel = kernel.replace("Placeholder.KERNEL_NAME", "loop")
    return (
        f"{kernel}\nstatic void leaf(void* const* row, int64_t at, int64_t n)\n"
        f"{{\n    loop({', '.join(argument(str(name)) for name in calls[0])});\n}}\n"
    )


def _as_graph(body: Body, symbols: Any, mode: FakeTensorMode) -> tuple[GraphModule, list[Any]]:
    """Write a body as a graph `(n, *inputs, *scalars) -> outputs`; also return its arguments."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource("n")
    symbol = symbols.create_symbol(LENGTH, source, DimDynamic.DYNAMIC, constraint_dim=None)
    n = symbols.create_symintnode(symbol, hint=LENGTH, source=source)
    with mode:
        vectors = [torch.empty(n, dtype=dtype) for dtype in body.inputs]
        numbers = [torch.empty((), dtype=dtype) for dtype in body.scalars]
    graph = Graph()
    length, *rest = [graph.placeholder(f"x{i}") for i in range(1 + len(vectors) + len(numbers))]
    for node, value in zip([length, *rest], [n, *vectors, *numbers], strict=True):
        node.meta["val"] = value
    kinds: dict[str, list[Node]] = {
        "input": rest[: len(vectors)],
        "scalar": rest[len(vectors) :],
        "call": [],
    }

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, args, kwargs)
        with mode:
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda z: z.meta["val"]), **kwargs)
        return node

    def operand(z: Any) -> Any:
        if isinstance(z, Operand):
            return kinds[z.kind][z.position]
        if isinstance(z, Filled):
            size = [length] if z.has_axis else []
            return call(aten.full.default, size, z.number.value(), dtype=z.dtype, device="cpu")
        return z.value() if isinstance(z, Number) else z

    for target, args, kwargs in body.calls:
        options = {name: operand(z) for name, z in kwargs}
        kinds["call"].append(call(target, *map(operand, args), **options))
    graph.output(tuple(kinds["call"][i] for i in body.outputs))
    return _make_graph_module({}, graph), [n, *vectors, *numbers]


@cache
def can_lower(target: Any) -> bool:
    """Check for an elementwise operation that Inductor writes as a loop."""
    from torch._inductor.lowering import fallbacks, lowerings

    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and torch.Tag.pointwise in target.tags
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
        and target in lowerings
        and target not in fallbacks
    )


# g++ takes half a minute to optimise a function that fills a table of a few thousand addresses.
KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
namespace KERNEL_NAME_parts {{
{source}
typedef void* Row[{columns}];
static __attribute__((noinline)) void walk_leaves(const Row* table)
{{
    static const int64_t sizes[] = {{{sizes}}};
    {walk}
}}
}}
extern "C"
#if defined(__clang__)
__attribute__((optnone))
#else
__attribute__((optimize("O0")))
#endif
void KERNEL_NAME(PARAMETERS)
{{
    using namespace KERNEL_NAME_parts;
    const Row table[] = {{
        {rows}
    }};
    walk_leaves(table);
}}
"""

WHOLE_LEAVES = """{run}
    for (int64_t i = 0; i < {leaves}; ++i) leaf(table[i], 0, sizes[i]);"""

IN_PARTS = """auto walk = [&](int64_t begin, int64_t end) {{
        for (int64_t i = 0; i < {leaves} && end > 0; ++i) {{
            // A boundary between two threads is the end of a vector.
            int64_t from = begin <= 0 ? 0 : begin >= sizes[i] ? sizes[i] : begin / 64 * 64;
            int64_t to = end >= sizes[i] ? sizes[i] : end / 64 * 64;
            if (from < to) leaf(table[i], from, to - from);
            begin -= sizes[i];
            end -= sizes[i];
        }}
    }};
    {run}"""

ONE_THREAD = "walk(0, {total});"
THREADS = """if (omp_get_max_threads() > 1 && !omp_in_parallel()) {{
        #pragma omp parallel
        {{
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            walk({total} * thread / threads, {total} * (thread + 1) / threads);
        }}
    }} else walk(0, {total});"""


@cache
def register_leafwise() -> None:
    """Register the lowering of `fdl::leafwise_` with Inductor."""
    from torch._inductor.lowering import register_lowering

    class Leafwise(kernel_that_writes()):  # type: ignore[misc]
        """The call of the kernel."""

        kind = "leafwise"

        def __init__(
            self,
            source: str,
            in_parts: bool,
            sizes: Sequence[int],
            reads: Sequence[Any],
            *,
            writes: Sequence[Any],
        ) -> None:
            self.source, self.in_parts, self.sizes = source, in_parts, sizes
            self.traffic = sum(prod(map(int, x.get_size())) for x in [*reads, *writes])
            super().__init__(reads, writes)

        def text(self, reads: Sequence[str], writes: Sequence[str]) -> str:
            leaves, total = len(self.sizes), sum(self.sizes)
            n, m = len(reads) // leaves, len(writes) // leaves
            rows = [
                [*reads[n * i : n * (i + 1)], *writes[m * i : m * (i + 1)]] for i in range(leaves)
            ]
            several = self.traffic >= WORTH_THREADS
            if self.in_parts:
                walk, run = IN_PARTS, THREADS if several else ONE_THREAD
            else:
                walk, run = WHOLE_LEAVES, "#pragma omp parallel for" * several
            return KERNEL.format(
                source=self.source,
                columns=n + m,
                rows=",\n        ".join(f"{{{', '.join(row)}}}" for row in rows),
                sizes=", ".join(map(str, self.sizes)),
                walk=walk.format(leaves=leaves, run=run.format(total=total)),
            )

    @register_lowering(LEAFWISE, type_promotion_kind=None)
    def lower_leafwise(*arguments: Any, writes: Sequence[Any]) -> None:
        Leafwise(*arguments, writes=writes)
