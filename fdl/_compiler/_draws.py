"""Random words on the CPU, as loops of the compiled program: `fdl::random_words`.

torch has no rotation of 32-bit words. Written with 64-bit numbers, Threefry takes longer to compute
than in these loops, and to compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from fdl._compiler._blocks import vector_registers
from fdl._compiler._kernels import call_kernel, kernel_that_returns, place
from fdl._threefry import dtype_of_words

WORDS = torch.ops.fdl.random_words.default

TYPES = ["const int64_t*", "RESULT*", *["const int64_t"] * 5]
SOURCE = """
#include <cstdint>
#include <cstring>
#include <omp.h>
namespace KERNEL_NAME_parts {
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uRESULT Results __attribute__((vector_size(BYTES / 4 * sizeof(RESULT))));
constexpr int64_t lanes = BYTES / 4, vectors = 4, together = vectors * lanes;

// Five times four rounds, then a key; several vectors at once, since each waits for itself.
static inline void encrypt(Words* a, Words* b, uint32_t k0, uint32_t k1) {
    const uint32_t keys[3] = {k0, k1, k0 ^ k1 ^ 0x1BD11BDAu};
    constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    for (int v = 0; v < vectors; ++v) { a[v] += k0; b[v] += k1; }
    #pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
        #pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int r = rotations[i % 2][j];
            #pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                a[v] += b[v];
                b[v] = (b[v] << r | b[v] >> (32 - r)) ^ a[v];
            }
        }
        #pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            a[v] += keys[(i + 1) % 3];
            b[v] += keys[(i + 2) % 3] + uint32_t(i + 1);
        }
    }
}

// The words of counters from `start` on, `count` of them; narrow ones move right by `shift`.
static void draw(
    const int64_t* key, RESULT* to, int64_t start, int64_t count, bool wide, int shift) {
    const uint32_t low = uint32_t(start), high = uint32_t(start >> 32);
    Words a[vectors], b[vectors];
    for (int v = 0; v < vectors; ++v) {
        for (int lane = 0; lane < lanes; ++lane) b[v][lane] = low + v * lanes + lane;
        a[v] = high - Words(b[v] < low);  // a comparison gives −1
    }
    encrypt(a, b, uint32_t(key[0]), uint32_t(key[1]));
    Results results[vectors];
    for (int v = 0; v < vectors; ++v)
        results[v] = wide ? __builtin_convertvector(a[v], Results) << 32
                                | __builtin_convertvector(b[v], Results)
                          : __builtin_convertvector((a[v] ^ b[v]) >> shift, Results);
    if (count == together) memcpy(to, results, sizeof(results));
    else memcpy(to, results, count * sizeof(RESULT));
}
}

extern "C" void KERNEL_NAME(PARAMETERS)
{
    using namespace KERNEL_NAME_parts;
    const int64_t keys = a3, size = a4;
    const bool wide = a5 == 64;
    const int64_t parts = (size + together - 1) / together;
    auto work = [&](int64_t i) {
        const int64_t key = i / parts, from = i % parts * together, left = size - from;
        draw(a0 + a2 + 2 * key, a1 + key * size + from, from, left < together ? left : together,
             wide, int(a6));
    };
    if (keys * size > SMALL && !omp_in_parallel()) {
        #pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < keys * parts; ++i) work(i);
    } else {
        for (int64_t i = 0; i < keys * parts; ++i) work(i);
    }
}
"""
SMALL = 1 << 14  # words, up to which one thread draws them


def source_of(dtype: torch.dtype, size: int) -> tuple[str, list[str]]:
    """Return the kernel that draws `dtype`, by vectors of `size` bytes, and its types."""
    result = "int32_t" if dtype is torch.int32 else "int64_t"
    source = SOURCE.replace("BYTES", str(size)).replace("SMALL", str(SMALL))
    return source.replace("RESULT", result), [kind.replace("RESULT", result) for kind in TYPES]


@cache
def register_draws() -> None:
    """Register the lowering of `fdl::random_words` with Inductor."""
    from torch._inductor.ir import ExternKernel, TensorBox
    from torch._inductor.lowering import register_lowering

    class Draws(kernel_that_returns()):  # type: ignore[misc]
        """The call of the loop."""

        def __init__(self, key: Any, shape: Sequence[int], width: int, shift: int) -> None:
            self.count, self.width, self.shift = prod(shape), width, shift
            size, dtype = [*key.get_size()[:-1], *shape], dtype_of_words(shift)
            super().__init__(size, dtype, [ExternKernel.require_contiguous(key)])

        def codegen(self, wrapper: Any) -> None:
            buffer, start, _ = place(self.inputs[0])
            keys = prod(self.get_size()) // self.count
            numbers = [start, keys, self.count, self.width, self.shift]
            names = [buffer.codegen_reference(), self.get_name()]
            source, types = source_of(self.get_dtype(), vector_registers()[0])
            arguments = [*names, *map(wrapper.codegen_sizevar, numbers)]
            call_kernel(wrapper, "draws", source, types, arguments)

    @register_lowering(WORDS, type_promotion_kind=None)
    def lower_words(key: TensorBox, shape: Sequence[int], width: int, shift: int) -> Any:
        return TensorBox.create(Draws(key, shape, width, shift))
