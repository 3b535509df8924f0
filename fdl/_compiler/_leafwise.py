"""One kernel for the same computation on many leaves: `fdl::leafwise_`.

Inductor lowers the computation once, for a vector of any length. The kernel walks over a table with
a row for each leaf: the memory that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

aten = torch.ops.aten

LENGTH = 1031  # an example; the kernel is for any
WORTH_THREADS = 1 << 18  # numbers read and written, below which one thread is as fast

torch.library.define(
    "fdl::leafwise_",
    "(str source, bool in_parts, int[] sizes, Tensor[] reads, Tensor(a!)[] writes) -> ()",
)


@torch.library.register_fake("fdl::leafwise_")
def _(
    source: str, in_parts: bool, sizes: list[int], reads: list[Tensor], writes: list[Tensor]
) -> None:
    pass


LEAFWISE = torch.ops.fdl.leafwise_.default


class Operand(NamedTuple):
    """An argument of a call: an input, a scalar, or the result of an earlier call."""

    kind: Literal["input", "scalar", "call"]
    index: int


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
            own = {z.index for z in operands if z.kind == "input"}
            needed.append(own.union(*(needed[z.index] for z in operands if z.kind == "call")))
        return needed[call]


@cache
def leaf_source(body: Body) -> str | None:
    """Return a C++ function that computes a part of one leaf; None if it takes several loops.

    `leaf(row, at, n)` computes the numbers from `at` on, n of them; `row` has the addresses of the
    inputs, the scalars and the outputs.
    """
    from torch._inductor import config
    from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    symbols = ShapeEnv()
    mode = FakeTensorMode(shape_env=symbols)
    module, arguments = _as_graph(body, symbols, mode)
    calls: list[list[str]] = []
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
    if len(calls) != 1 or len(set(results)) < len(results):
        return None
    (source,) = wrapper.src_to_kernel
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"][1:]
    columns = [*names, *results]
    dtypes = [*body.inputs, *body.scalars]
    outputs = [module.graph.output_node().args[0][i].meta["val"] for i in range(len(results))]
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
    kernel = source.replace("Placeholder.KERNEL_NAME", "loop").replace('extern "C"', "static")
    return (
        f"{kernel}\nstatic void leaf(void* const* row, int64_t at, int64_t n)\n"
        f"{{\n    loop({', '.join(argument(str(name)) for name in calls[0])});\n}}\n"
    )


def _as_graph(
    body: Body, symbols: ShapeEnv, mode: FakeTensorMode
) -> tuple[GraphModule, list[Any]]:
    """Write a body as a graph `(n, *inputs, *scalars) -> outputs`; also return its arguments."""
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
            return kinds[z.kind][z.index]
        if isinstance(z, Filled):
            size = [length] if z.has_axis else []
            return call(aten.full.default, size, z.number.value(), dtype=z.dtype, device="cpu")
        return z.value() if isinstance(z, Number) else z

    for target, args, kwargs in body.calls:
        options = {name: operand(z) for name, z in kwargs}
        kinds["call"].append(call(target, *map(operand, args), **options))
    graph.output(tuple(kinds["call"][i] for i in body.outputs))
    return GraphModule({}, graph), [n, *vectors, *numbers]


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


WALK = """
{body}
extern "C" void {name}({parameters})
{{
    void* const table[][{columns}] = {{
        {rows}
    }};
    static const int64_t sizes[] = {{{sizes}}};
    {walk}
}}
"""

WHOLE_LEAVES = """for (int64_t i = 0; i < {leaves}; ++i) leaf(table[i], 0, sizes[i]);"""

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
            walk({total} / threads * thread,
                 thread + 1 == threads ? {total} : {total} / threads * (thread + 1));
        }}
    }} else walk(0, {total});"""


@cache
def register_leafwise() -> None:
    """Register the lowering of `fdl::leafwise_` with Inductor."""
    from torch._inductor import metrics
    from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
    from torch._inductor.ir import (
        BaseView,
        ExternKernel,
        MutationOutput,
        NoneLayout,
        ReinterpretView,
        TensorBox,
    )
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V

    def place(x: Any) -> tuple[Any, int]:
        """Return the buffer that holds a contiguous tensor, and where it starts."""
        x = ExternKernel.require_contiguous(x)
        view = ExternKernel.unwrap_storage_for_input(ExternKernel.realize_input(x))
        if not isinstance(view, ReinterpretView):
            return view, 0
        buffer = ExternKernel.unwrap_storage_for_input(view.data)
        if buffer.get_dtype() != view.get_dtype():
            raise NotImplementedError("leafwise: a view of another dtype")
        return buffer, int(view.layout.offset - buffer.get_layout().offset)

    class Leafwise(ExternKernel):
        """The call of the kernel."""

        def __init__(
            self,
            source: str,
            in_parts: bool,
            sizes: Sequence[int],
            reads: Sequence[TensorBox],
            writes: Sequence[TensorBox],
        ) -> None:
            self.source, self.in_parts, self.sizes = source, in_parts, sizes
            places = {id(x): place(x) for x in [*reads, *writes]}
            self.buffers = {buffer.get_name(): buffer for buffer, _ in places.values()}
            device = torch.device("cpu")
            super().__init__(None, NoneLayout(device=device), list(self.buffers.values()))
            self.reads = [(b.get_name(), at) for b, at in (places[id(x)] for x in reads)]
            self.writes = [(b.get_name(), at) for b, at in (places[id(x)] for x in writes)]
            self.name = V.graph.register_buffer(self)
            V.graph.register_operation(self)
            self.mutation_outputs = [
                MutationOutput(NoneLayout(device=device), self.buffers[name], self)
                for name, _ in self.writes
            ]

        def get_outputs(self) -> list[Any]:
            return [self, *self.mutation_outputs]

        def should_allocate(self) -> bool:
            return False

        def has_side_effects(self) -> bool:
            return True

        def codegen(self, wrapper: Any) -> None:
            names = list(self.buffers)
            types = [f"{DTYPE_TO_CPP[self.buffers[name].get_dtype()]}*" for name in names]
            parameters = [f"{kind} a{i}" for i, kind in enumerate(types)]
            body = self._text(names)
            key = (body, tuple(types))
            if key not in wrapper.src_to_kernel:
                name = f"cpp_leafwise_{wrapper.next_kernel_suffix()}"
                wrapper.src_to_kernel[key] = name
                symbol = name if V.graph.cpp_wrapper else "kernel"
                text = body.replace("KERNEL_NAME", symbol).replace(
                    "PARAMETERS", ", ".join(parameters)
                )
                if not V.graph.cpp_wrapper:
                    text = f"async_compile.cpp_pybinding({types!r}, r'''{text}''')"
                definition = f'extern "C" void {symbol}({", ".join(parameters)});\n'
                wrapper.define_kernel(name, text, gpu=False, cpp_definition=definition)
                metrics.generated_kernel_count += 1
            wrapper.generate_kernel_call(
                wrapper.src_to_kernel[key], names, triton=False, arg_types=types
            )

        def _text(self, names: list[str]) -> str:
            index = {name: f"a{i}" for i, name in enumerate(names)}
            leaves = len(self.sizes)

            def row(i: int) -> list[str]:
                columns = [
                    place
                    for places in (self.reads, self.writes)
                    for place in places[
                        i * (len(places) // leaves) : (i + 1) * (len(places) // leaves)
                    ]
                ]
                return [f"{index[name]} + {at}" if at else index[name] for name, at in columns]

            rows = [f"{{{', '.join(row(i))}}}" for i in range(leaves)]
            columns = (len(self.reads) + len(self.writes)) // leaves
            total = sum(self.sizes)
            run = THREADS if total * columns >= WORTH_THREADS else ONE_THREAD
            walk = IN_PARTS if self.in_parts else WHOLE_LEAVES
            return WALK.format(
                body=self.source,
                name="KERNEL_NAME",
                parameters="PARAMETERS",
                columns=columns,
                rows=",\n        ".join(rows),
                sizes=", ".join(map(str, self.sizes)),
                walk=walk.format(leaves=leaves, run=run.format(total=total)),
            )

    @register_lowering(LEAFWISE, type_promotion_kind=None)
    def lower_leafwise(
        source: str,
        in_parts: bool,
        sizes: Sequence[int],
        reads: Sequence[TensorBox],
        writes: Sequence[TensorBox],
    ) -> None:
        Leafwise(source, in_parts, sizes, reads, writes)
