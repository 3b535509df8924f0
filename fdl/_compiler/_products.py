"""Small matrix products, as loops of the compiled program: `fdl::product`.

The call of a matrix library takes some microseconds before it multiplies, longer than the product
of a narrow layer; with several threads it may take ten times as long.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

from fdl._compiler._kernels import call_kernel, kernel_that_returns, place

SMALL = 1 << 20  # multiplications, up to which these loops are as fast as a library
# The same with AVX2 alone, by whether the result has few rows or columns.
SMALL_WIDE, SMALL_NARROW = 1 << 19, 1 << 22
NARROW = 16  # columns, which a vector of 512 bits holds
LONGEST = 1024  # terms of a sum
WORTH_THREADS = 1 << 19  # multiplications, from which on threads share them

torch.library.define("fdl::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


torch.library.register_fake(
    "fdl::product", lambda a, b, bias: a.new_empty(*a.shape[:-1], b.shape[-1])
)

PRODUCT = torch.ops.fdl.product.default


def has_short_vectors() -> bool:
    """Check for AVX2 alone. AVX-512 is used by oneDNN, and by MKL on Intel's processors only."""
    return get_cpu_capability() == "AVX2"


def is_small(a: Tensor, b: Tensor) -> bool:
    """Check for a product of `[m, k]` and `[k, n]`, or of batches of them, worth a loop."""
    terms = a.shape[-1]
    fits = a.dtype is torch.float32 and 0 < terms <= LONGEST
    most = SMALL
    if a.ndim == 2 and has_short_vectors():
        few_rows = a.shape[0] <= NARROW and b.stride(1) == 1  # else b is copied, for few products
        most = SMALL_NARROW if b.shape[1] <= NARROW or few_rows else SMALL_WIDE
    return fits and a.numel() * b.shape[-1] <= most and _has_vectors()


@cache
def _has_vectors() -> bool:
    """Check that Inductor's code has vectors on this processor."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return bool(pick_vec_isa())


TYPES = ["const float*"] * 3 + ["float*"] + ["const int64_t"] * 13
SOURCE = (
    """
#include <torch/csrc/inductor/cpp_prefix.h>
#include <omp.h>
namespace KERNEL_NAME_parts {
using Vec = at::vec::Vectorized<float>;
constexpr int64_t width = Vec::size();
constexpr int most_rows = width >= 16 ? 8 : 6;  // as many sums as there are registers

// Rows of the product, and `columns` of its columns, at most V vectors.
template <int R, int V>
inline void block(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                  const float* bias, float* c, int64_t c_row, int64_t columns, int64_t terms) {
    Vec sums[R][V];
    #pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
        const int64_t left = columns - v * width;
        const Vec start = bias ? Vec::loadu(bias + v * width, left < width ? left : width) : Vec(0);
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][v] = start;
    }
    for (int64_t k = 0; k < terms; ++k) {
        Vec row[V];
        #pragma GCC unroll 8
        for (int v = 0; v < V; ++v) row[v] = Vec::loadu(b + k * b_row + v * width);
        #pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec factor(a[r * a_row + k * a_column]);
            #pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[r][v] = at::vec::fmadd(factor, row[v], sums[r][v]);
        }
    }
    #pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        #pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const int64_t left = columns - v * width;
            sums[r][v].store(c + r * c_row + v * width, left < width ? left : width);
        }
    }
}

template <int V>
void panel(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
           const float* bias, float* c, int64_t c_row, int64_t columns, int64_t rows,
           int64_t terms) {
    int64_t i = 0;
    for (; i + most_rows <= rows; i += most_rows)
        block<most_rows, V>(a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row,
                            columns, terms);
    for (; i + 4 <= rows; i += 4)
        block<4, V>(a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row,
                    columns, terms);
    for (; i + 2 <= rows; i += 2)
        block<2, V>(a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row,
                    columns, terms);
    for (; i < rows; ++i)
        block<1, V>(a + i * a_row, a_row, a_column, b, b_row, bias, c + i * c_row, c_row,
                    columns, terms);
}

// Two rows of a times C columns of b, both contiguous, as vectors of terms.
template <int C>
void two_rows(const float* a, int64_t a_row, const float* b, int64_t b_column, const float* bias,
              float* c, int64_t c_row, int64_t k)
{
    Vec sums[2][C];
    #pragma GCC unroll 5
    for (int j = 0; j < C; ++j) sums[0][j] = sums[1][j] = Vec(0);
    auto add = [&](int64_t p, int64_t count) {
        const Vec x0 = Vec::loadu(a + p, count), x1 = Vec::loadu(a + a_row + p, count);
        #pragma GCC unroll 5
        for (int j = 0; j < C; ++j) {
            const Vec y = Vec::loadu(b + j * b_column + p, count);
            sums[0][j] = at::vec::fmadd(x0, y, sums[0][j]);
            sums[1][j] = at::vec::fmadd(x1, y, sums[1][j]);
        }
    };
    int64_t p = 0;
    for (; p + width <= k; p += width) add(p, width);
    if (p < k) add(p, k - p);
    for (int r = 0; r < 2; ++r)
        for (int j = 0; j < C; ++j)
            c[r * c_row + j] = (bias ? bias[j] : 0) + at::vec::vec_reduce_all<float>(
                [](Vec& p, Vec& q) { return p + q; }, sums[r][j]);
}

// The same for all rows, at least two, and all columns, in groups of at most five.
static void by_pairs(const float* a, int64_t a_row, const float* b, int64_t b_column,
                     const float* bias, float* c, int64_t m, int64_t k, int64_t n, bool threads)
{
    constexpr decltype(&two_rows<1>) kernels[] = {
        two_rows<1>, two_rows<2>, two_rows<3>, two_rows<4>, two_rows<5>};
    const int64_t groups = (n + 4) / 5;
    auto four_rows = [&](int64_t i) {
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t j = g * n / groups, columns = (g + 1) * n / groups - j;
            for (int64_t r = i; r < i + 4 && r < m; r += 2) {
                const int64_t row = r + 2 > m ? m - 2 : r;  // the last one once more if m is odd
                kernels[columns - 1](a + row * a_row, a_row, b + j * b_column, b_column,
                                     bias ? bias + j : bias, c + row * n + j, n, k);
            }
        }
    };
    if (threads) {
        #pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < m; i += 4) four_rows(i);
    } else {
        for (int64_t i = 0; i < m; i += 4) four_rows(i);
    }
}

// Few rows times a matrix whose columns are contiguous: sums of products, without a copy.
static void by_columns(const float* a, int64_t a_row, const float* b, int64_t b_column,
                       const float* bias, float* c, int64_t m, int64_t k, int64_t n)
{
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            const float *x = a + i * a_row, *y = b + j * b_column;
            Vec sum(0);
            int64_t p = 0;
            for (; p + width <= k; p += width)
                sum = at::vec::fmadd(Vec::loadu(x + p), Vec::loadu(y + p), sum);
            const int64_t left = k - p;
            if (left) sum = at::vec::fmadd(Vec::loadu(x + p, left), Vec::loadu(y + p, left), sum);
            const float total = at::vec::vec_reduce_all<float>(
                [](Vec& p, Vec& q) { return p + q; }, sum);
            c[i * n + j] = bias ? total + bias[j] : total;
        }
    }
}

// Columns of the product from j on, as many as fit into two vectors.
static void panel_at(int64_t j, const float* a, int64_t a_row, int64_t a_column, const float* b,
                     int64_t b_row, int64_t b_column, const float* bias, float* c, int64_t m,
                     int64_t k, int64_t n, bool threads)
{
    alignas(64) float packed[LONGEST * 2 * width];  // columns of b, as rows of whole vectors
    const int64_t columns = n - j < 2 * width ? n - j : 2 * width;
    const int64_t padded = columns <= width ? width : 2 * width;
    const float* from = b + j * b_column;
    int64_t from_row = b_row;
    if (b_column != 1 || columns < padded) {
        if (columns < padded) std::fill(packed, packed + k * padded, 0.0f);
        if (b_row == 1) {
            for (int64_t q = 0; q < columns; ++q)
                for (int64_t p = 0; p < k; ++p) packed[p * padded + q] = from[p + q * b_column];
        } else {
            for (int64_t p = 0; p < k; ++p)
                for (int64_t q = 0; q < columns; ++q)
                    packed[p * padded + q] = from[p * b_row + q * b_column];
        }
        from = packed;
        from_row = padded;
    }
    const float* start = bias ? bias + j : nullptr;
    auto* multiply = padded == width ? &panel<1> : &panel<2>;
    constexpr int64_t some = 2 * most_rows;
    auto rows = [&](int64_t i, int64_t count) {
        multiply(a + i * a_row, a_row, a_column, from, from_row, start, c + j + i * n, n, columns,
                 count, k);
    };
    if (!threads) return rows(0, m);
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i += some) rows(i, m - i < some ? m - i : some);
}

static void by_rows(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                    int64_t b_column, const float* bias, float* c, int64_t m, int64_t k, int64_t n)
{
    const bool threads = m * k * n > WORTH_THREADS && !omp_in_parallel();
    const int64_t padded = (n + width - 1) / width * width;
    if (a_column == 1 && b_row == 1 && n <= NARROW && 2 * padded >= 3 * n && k >= 8 * width)
        return by_pairs(a, a_row, b, b_column, bias, c, m, k, n, threads);
    auto panel_from = [&](int64_t j, bool threads) {
        panel_at(j, a, a_row, a_column, b, b_row, b_column, bias, c, m, k, n, threads);
    };
    if (threads && n > 4 * width) {  // they divide the panels; otherwise the rows of each
        #pragma omp parallel for schedule(static)
        for (int64_t j = 0; j < n; j += 2 * width) panel_from(j, false);
    } else {
        for (int64_t j = 0; j < n; j += 2 * width) panel_from(j, threads);
    }
}

}  // namespace

extern "C" void KERNEL_NAME(PARAMETERS)
{
    using namespace KERNEL_NAME_parts;
    const float *a = a0 + a4, *b = a1 + a5, *bias = a6 < 0 ? nullptr : a2 + a6;
    float* c = a3;
    const int64_t batch = a7, m = a8, k = a9, n = a10, a_batch = a11, a_row = a12, a_column = a13;
    const int64_t b_batch = a14, b_row = a15, b_column = a16;
    for (int64_t i = 0; i < batch; ++i, a += a_batch, b += b_batch, c += m * n) {
        if (m < most_rows && a_column == 1 && b_row == 1)
            by_columns(a, a_row, b, b_column, bias, c, m, k, n);
        else
            by_rows(a, a_row, a_column, b, b_row, b_column, bias, c, m, k, n);
    }
}
""".replace("LONGEST", str(LONGEST))
    .replace("WORTH_THREADS", str(WORTH_THREADS))
    .replace("NARROW", str(NARROW))
)


@cache
def register_product() -> None:
    """Register the lowering of `fdl::product` with Inductor."""
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering

    class Product(kernel_that_returns()):  # type: ignore[misc]
        """The call of the loop."""

        def __init__(self, a: Any, b: Any, bias: Any) -> None:
            size = [*a.get_size()[:-1], b.get_size()[-1]]
            super().__init__(size, a.get_dtype(), [z for z in (a, b, bias) if z is not None])

        def codegen(self, wrapper: Any) -> None:
            places = [place(z) for z in self.inputs]
            names = [buffer.codegen_reference() for buffer, _, _ in places]
            starts = [start for _, start, _ in places]
            if len(places) == 2:  # without a bias
                names, starts = [*names, names[0]], [*starts, -1]
            (m, n), k = self.get_size()[-2:], self.inputs[0].get_size()[-1]
            batch = prod(self.get_size()[:-2])
            strides = [number for _, _, s in places[:2] for number in [0, *s][-3:]]
            numbers = map(wrapper.codegen_sizevar, [*starts, batch, m, k, n, *strides])
            call_kernel(wrapper, "product", SOURCE, TYPES, [*names, self.get_name(), *numbers])

    @register_lowering(PRODUCT, type_promotion_kind=None)
    def lower_product(a: TensorBox, b: TensorBox, bias: TensorBox | None) -> Any:
        return TensorBox.create(Product(a, b, bias))
