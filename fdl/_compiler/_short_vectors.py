"""Convert bools and bytes by vectors, and include less, where vectors have 256 bits.

A vector holds 8 floats, but 32 bools or bytes, of which torch's headers convert 8 through memory,
one by one: to keep which numbers a ReLU or a dropout sets to 0 took thirty times as long as to find
out, and to read images longer than to divide them by 255.
"""

from __future__ import annotations

import re
from functools import cache, wraps
from typing import Any

# What kernels with vectors of 256 bits use of g++'s immintrin.h. Half of its lines are for those of
# 512 bits: to read them takes a fifth of the time to compile a small kernel.
INTRINSICS = """
#if defined(__GNUC__) && !defined(__clang__) && !defined(_IMMINTRIN_H_INCLUDED)
#define _IMMINTRIN_H_INCLUDED
#include <x86gprintrin.h>
#include <smmintrin.h>
#include <wmmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#include <f16cintrin.h>
#include <fmaintrin.h>
#endif
"""
INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
EIGHT = re.compile(
    r"at::vec::Vectorized<(uint8_t|int8_t)>::loadu\((.+), static_cast<int64_t>\(8\)\);"
)
CODE = """
#if defined(CPU_CAPABILITY_AVX2) && !defined(FDL_SHORT_VECTORS)
#define FDL_SHORT_VECTORS
namespace at::vec {
inline namespace CPU_CAPABILITY {
template <>
inline void VecMask<float, 1>::store(bool* to, int count) {
    const __m256i lanes = _mm256_castps_si256(mask_[0]);  // all bits of a lane, or none
    const __m128i halves = _mm_packs_epi32(
        _mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    const __m128i bytes = _mm_and_si128(_mm_packs_epi16(halves, halves), _mm_set1_epi8(1));
    const int64_t all = _mm_cvtsi128_si64(bytes);
    if (count == 8) memcpy(to, &all, 8);
    else memcpy(to, &all, count);
}
template <>
template <>
inline VecMask<float, 1> VecMask<float, 1>::from(const bool* from, int count) {
    int64_t all = 0;
    if (count == 8) memcpy(&all, from, 8);
    else memcpy(&all, from, count);
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(all));
    const __m256i set = _mm256_cmpgt_epi32(lanes, _mm256_setzero_si256());
    return Vectorized<float>(_mm256_castsi256_ps(set));
}
template <typename T>
inline Vectorized<T> fdl_first_eight(const T* from) {
    return _mm256_zextsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
}  // namespace CPU_CAPABILITY
}  // namespace at::vec
#endif
"""


def with_short_vectors(code: str) -> str:
    """Return the code of a kernel with these functions, if it has a use for them.

    >>> with_short_vectors("at::vec::Vectorized<uint8_t>::loadu(p, static_cast<int64_t>(8));")
    'at::vec::fdl_first_eight<uint8_t>(p);'
    """
    code = EIGHT.sub(r"at::vec::fdl_first_eight<\1>(\2);", code)
    if "VecMask<float,1>" in code or "fdl_first_eight" in code:
        code = code.replace(INCLUDE, INCLUDE + CODE, 1)
    return code


def narrowed(code: str) -> str:
    """Return the code of a kernel that includes and converts what this processor's vectors need."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    if INCLUDE not in code or str(pick_vec_isa()) != "avx2":
        return code
    return INTRINSICS + with_short_vectors(code)


@cache
def use_short_vectors() -> None:
    """Let Inductor's kernels use these functions, and include no wider intrinsics."""
    from torch._inductor.codegen.cpp import KernelGroup

    group: Any = KernelGroup
    generate = group.codegen_group

    @wraps(generate)
    def codegen_group(self: Any, *args: Any, **kwargs: Any) -> str:
        return narrowed(generate(self, *args, **kwargs))

    group.codegen_group = codegen_group
