"""Rows of a large table by their numbers, fetched ahead of their use: `fdl::rows`.

Rows in any order are not what processors fetch by themselves: to wait for each row of a batch takes
as long as to compute with it.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fdl._compiler._kernels import call_kernel, kernel_that_returns, place

LARGE = 1 << 21  # bytes of a table that does not stay in a processor's own cache
LONG, LONGEST = 256, 1 << 14  # bytes of a row; processors fetch the rest of longer ones
MOST = 1 << 22  # bytes of a result, which is written to memory and read again

torch.library.define("fdl::rows", "(Tensor table, Tensor rows) -> Tensor")


torch.library.register_fake(
    "fdl::rows", lambda table, rows: table.new_empty(*rows.shape, *table.shape[1:])
)

ROWS = torch.ops.fdl.rows.default


def is_worth_it(table: Tensor, rows: Tensor) -> bool:
    """Check for rows `[n]` of a large table, which are contiguous and neither short nor long."""
    if rows.ndim != 1 or rows.dtype is not torch.int64 or table.ndim < 2:
        return False
    size = prod(table.shape[1:]) * table.dtype.itemsize
    fits = LONG <= size <= LONGEST and rows.shape[0] * size <= MOST
    return fits and table.shape[0] * size >= LARGE and table[0].is_contiguous()


TYPES = ["const uint8_t*", "const int64_t*", "uint8_t*"] + ["const int64_t"] * 6
SOURCE = """
#include <cstdint>
#include <cstring>
#include <omp.h>

extern "C" void KERNEL_NAME(PARAMETERS)
{
    constexpr int64_t line = 64, ahead = 4;
    const int64_t count = a5, bytes = a6, stride = a7, all = a8;
    auto row = [&](int64_t i) {
        const int64_t at = a1[a4 + i];
        return a0 + a3 + (at < 0 ? at + all : at) * stride;
    };
    auto fetch = [&](int64_t i) {
        for (int64_t byte = 0; byte < bytes; byte += line) __builtin_prefetch(row(i) + byte);
    };
    auto copy = [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end && i < first + ahead; ++i) fetch(i);
        for (int64_t i = first; i < end; ++i) {
            if (i + ahead < end) fetch(i + ahead);
            memcpy(a2 + i * bytes, row(i), bytes);
        }
    };
    if (count * bytes < SMALL || omp_in_parallel()) return copy(0, count);
    #pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        copy(count * me / threads, count * (me + 1) / threads);
    }
}
""".replace("SMALL", str(1 << 15))


@cache
def register_rows() -> None:
    """Register the lowering of `fdl::rows` with Inductor."""
    from torch._inductor.ir import ExternKernel, TensorBox
    from torch._inductor.lowering import register_lowering

    class Rows(kernel_that_returns()):  # type: ignore[misc]
        """The call of the loop."""

        def __init__(self, table: Any, rows: Any) -> None:
            size = [*rows.get_size(), *table.get_size()[1:]]
            rows = ExternKernel.require_contiguous(rows)
            super().__init__(size, table.get_dtype(), [table, rows])

        def codegen(self, wrapper: Any) -> None:
            (table, start, strides), (rows, first, _) = map(place, self.inputs)
            (count, *row), all_rows = self.get_size(), self.inputs[0].get_size()[0]
            size = self.get_dtype().itemsize
            numbers = [start * size, first, count, prod(row) * size, strides[0] * size, all_rows]
            names = [table.codegen_reference(), rows.codegen_reference(), self.get_name()]
            arguments = [*names, *map(wrapper.codegen_sizevar, numbers)]
            call_kernel(wrapper, "rows", SOURCE, TYPES, arguments)

    @register_lowering(ROWS, type_promotion_kind=None)
    def lower_rows(table: TensorBox, rows: TensorBox) -> Any:
        return TensorBox.create(Rows(table, rows))
