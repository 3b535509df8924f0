"""The kernel of a region: `fdl::blocks_`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.backends.cpu import get_cpu_capability
from torch.fx import Node

from fdl._compiler._block_axes import Axis, shape_of
from fdl._compiler._block_code import Block, axis_of, rest, whole
from fdl._compiler._block_ops import rule_of
from fdl._compiler._block_sums import ends_batch
from fdl._compiler._graph import value_of
from fdl._compiler._kernels import kernel_that_writes
from fdl._compiler._regions import Region

FOLDER = Path(__file__).parent / "blocks"
HEADERS = ("vectors.h", "functions.h", "layers.h", "convolutions.h", "pools.h", "products.h")
REGISTERS = {"AVX512": (64, 32), "AVX2": (32, 16)}  # bytes of a register, and their number
BASELINE = 16, 16

torch.library.define("fdl::blocks_", "(str source, Tensor[] reads, *, Tensor(a!)[] writes) -> ()")
torch.library.register_fake("fdl::blocks_", lambda *args, writes: None)
BLOCKS = torch.ops.fdl.blocks_.default


def vector_registers() -> tuple[int, int]:
    """Return the bytes of a vector of this processor, and how many it holds."""
    return REGISTERS.get(get_cpu_capability(), BASELINE)


class BlockSource:
    """The kernel of a region."""

    def __init__(self, region: Region) -> None:
        self.region = region
        size, registers = vector_registers()
        self.bytes = size
        width = size // region.dtype.itemsize
        number = "float" if region.dtype is torch.float32 else "double"
        reads = [*region.loads, *region.shared, *region.reads]
        names = {node: f"a{i}" for i, node in enumerate(reads)}
        shared = {node: names[node] for node in region.shared}
        block = self.block = Block(width, registers, number, shared, written=region.written)
        names |= {node: f"w{i}" for i, node in enumerate(region.keeps)}
        self.names = names
        # A value may be kept, in the order of blocks, and be a result too.
        results = {node: f"w{len(region.keeps) + i}" for i, node in enumerate(region.results)}
        for node in region.loads:
            self._load(node)
        for node in region.reads:
            block.places[node] = whole(f"k{names[node]}", rest(node))
        for node in region.keeps:
            block.given[node] = f"k{names[node]}"
        block.given |= {node: results[node] for node in region.results if ends_batch(node)}
        for node in region.nodes:
            rule = rule_of(node)
            if rule is not None and (rule.is_written or node in region.written):
                rule.emit(block, node)
        for node in region.keeps:
            if block.place(node).pointer != block.given[node]:
                block.copy(block.place(node), whole(block.given[node], rest(node)))
        for node in region.results:
            if not ends_batch(node):
                pointer = block.pointer(node)
                self._each_member("store_block", node, pointer, results[node])

    def _load(self, node: Node) -> None:
        """Read the images of a block; a mask as 0 and 1."""
        pointer = self.block.new(node).pointer
        kind = "load_flags" if value_of(node).dtype is torch.bool else "load_block"
        self._each_member(kind, node, pointer, self.names[node])

    def _each_member(self, function: str, node: Node, block: str, tensor: str) -> None:
        """Move the images of a block from or to a tensor, all that lies inside of their axis."""
        images, axis, members, inner = cast(Axis, axis_of(node))
        shape = shape_of(node)
        outside, size = prod(shape[:axis]) * members, inner * prod(shape[axis + 1 :])
        self.block.step(
            f"for (int64_t p = 0; p < {outside}; ++p)",
            f"    {function}<T>({block} + p * {size} * L, "
            f"{tensor} + (p * {images} + number * L) * {size}, {size}, images);",
        )

    def text(self) -> str:
        """Return C++ of the function `KERNEL_NAME(PARAMETERS)`."""
        block, region = self.block, self.region
        lines, memory = block.memory()
        kept = [
            f"T* const k{self.names[node]} = {'const_cast<T*>' * (node in region.reads)}"
            f"({self.names[node]}) + number * L * {prod(rest(node))};"
            for node in [*region.reads, *region.keeps]
        ]
        reads = [*region.loads, *region.shared, *region.reads]
        types = [
            "const bool*" if value_of(node).dtype is torch.bool else "const T*" for node in reads
        ] + ["T*"] * (len(region.keeps) + len(region.results))
        names = [f"a{i}" for i in range(len(reads))]
        names += [f"w{i}" for i in range(len(types) - len(reads))]
        parameters = ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))
        return KERNEL.format(
            number=block.number,
            bytes=self.bytes,
            parameters=parameters,
            names=", ".join(names),
            images=region.images,
            memory="\n    ".join([*lines, *kept]),
            steps="\n    ".join(line for step in block.steps for line in step),
            vectors=max(memory, 1),
            packed=max(block.packed, 1),
            packs="\n    ".join(block.packs),
            totals=max(block.totals, 1),
            ends="\n    ".join(block.ends),
        )


KERNEL = """
#define FDL_BLOCK_BYTES {bytes}
#include BLOCK_HEADERS
namespace KERNEL_NAME_parts {{
using namespace fdl_blocks;
typedef {number} T;
typedef Vec<T> V;
constexpr int64_t L = lanes<T>, images_of_batch = {images}, blocks = (images_of_batch + L - 1) / L;

// The images of one block, of which the first has the number `number` · L.
static void compute(int64_t number, int64_t from, int64_t images, T* memory, T* totals,
                    const T* packed, {parameters}) {{
    {memory}
    {steps}
}}

static void run({parameters}) {{
    std::unique_ptr<T[]> packed_weights(new T[{packed}]);
    T* const packed = packed_weights.get();
    {packs}
    const bool several = omp_get_max_threads() > 1 && !omp_in_parallel() && blocks > 1;
    int threads = several ? omp_get_max_threads() : 1;
    if (threads > blocks) threads = blocks;
    constexpr int64_t stride = {totals};
    std::unique_ptr<T[]> all_totals(new T[threads * stride]());
    T* const totals = all_totals.get();
    auto work = [&](int t) {{
        T* memory = static_cast<T*>(scratch({vectors} * bytes));
        const int64_t from = blocks * t / threads, to = blocks * (t + 1) / threads;
        for (int64_t number = from; number < to; ++number) {{
            const int64_t left = images_of_batch - number * L;
            compute(number, from, left < L ? left : L, memory, totals + t * stride, packed,
                    {names});
        }}
    }};
    if (several) {{
        // There may be fewer threads than asked for.
        #pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; ++t) work(t);
    }} else work(0);
    // How many images of a thread are the n-th of their block.
    auto images_at = [&](int t, int64_t n) {{
        const int64_t from = blocks * t / threads, to = blocks * (t + 1) / threads;
        return to - from - (to == blocks && n >= images_of_batch - (blocks - 1) * L);
    }};
    (void)images_at;
    {ends}
}}
}}
extern "C" void KERNEL_NAME(PARAMETERS)
{{
    using namespace KERNEL_NAME_parts;
    run(ARGUMENTS);
}}
"""


@cache
def headers() -> str:
    """Return what all kernels of regions share."""
    return "\n".join((FOLDER / name).read_text() for name in HEADERS)


@cache
def register_blocks() -> None:
    """Register the lowering of `fdl::blocks_` with Inductor."""
    from torch._inductor.lowering import register_lowering

    class Blocks(kernel_that_writes()):  # type: ignore[misc]
        """The call of the kernel."""

        kind = "blocks"

        def __init__(self, source: str, reads: Sequence[Any], writes: Sequence[Any]) -> None:
            self.source = source
            super().__init__(reads, writes)

        def text(self, reads: Sequence[str], writes: Sequence[str]) -> str:
            text = self.source.replace("#include BLOCK_HEADERS", headers())
            return text.replace("ARGUMENTS", ", ".join([*reads, *writes]))

    @register_lowering(BLOCKS, type_promotion_kind=None)
    def lower_blocks(source: str, reads: Sequence[Any], *, writes: Sequence[Any]) -> None:
        Blocks(source, reads, writes)
