// Vectors of as many numbers as a register holds, one number of each image of a block.
#ifndef FDL_BLOCKS_VECTORS
#define FDL_BLOCKS_VECTORS
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX512F__) && FDL_BLOCK_BYTES == 64
#define FDL_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && FDL_BLOCK_BYTES == 32
#define FDL_AVX2
#elif defined(__aarch64__) && FDL_BLOCK_BYTES == 16
#define FDL_NEON
#endif

namespace fdl_blocks {

constexpr int bytes = FDL_BLOCK_BYTES;  // of a register

template <typename T> struct Numbers;
template <> struct Numbers<float> {
    typedef float V __attribute__((vector_size(bytes)));
    typedef int32_t Mask __attribute__((vector_size(bytes)));
};
template <> struct Numbers<double> {
    typedef double V __attribute__((vector_size(bytes)));
    typedef int64_t Mask __attribute__((vector_size(bytes)));
};
template <typename T> using Vec = typename Numbers<T>::V;
template <typename T> using Mask = typename Numbers<T>::Mask;
template <typename T> constexpr int lanes = bytes / sizeof(T);  // images of a block

template <typename T> inline Vec<T> load(const T* from) {
    Vec<T> x;
    __builtin_memcpy(&x, from, bytes);
    return x;
}
template <typename T> inline void store(T* to, Vec<T> x) { __builtin_memcpy(to, &x, bytes); }
template <typename T> inline Vec<T> splat(T x) { return x - Vec<T>{}; }  // keeps −0
// A number of memory. GCC would load several and shuffle them, which takes registers and time.
inline Vec<float> broadcast(const float* from) {
#ifdef FDL_AVX2
    return (Vec<float>)_mm256_broadcast_ss(from);
#else
    return splat(*from);
#endif
}
inline Vec<double> broadcast(const double* from) {
#ifdef FDL_AVX2
    return (Vec<double>)_mm256_broadcast_sd(from);
#else
    return splat(*from);
#endif
}

// a b + c, rounded once where the processor can: the compiler is told not to contract.
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#ifdef FDL_AVX512
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FDL_AVX2)
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(FDL_NEON)
    return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#ifdef FDL_AVX512
    return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FDL_AVX2)
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(FDL_NEON)
    return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

// The numbers of `a` and `b` with these indices, from 0 to 2 lanes − 1.
template <typename T, int... I>
[[gnu::always_inline]] inline Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, Mask<T>{I...});
#endif
}
// The even (or odd) ones of the segments of `Size` numbers into which `a` and `b` are divided.
template <typename T, int Size, int Odd, int... I>
[[gnu::always_inline]] inline Vec<T> segments(Vec<T> a, Vec<T> b,
                                              std::integer_sequence<int, I...>) {
    return shuffle<T, ((I / Size * 2 + Odd) * Size + I % Size)...>(a, b);
}

// The sums over the images of a block, of N ≤ `lanes` vectors: result n is that of x[n]. Two vectors
// of parts become one, with half as many parts of each: this takes three instructions a vector, where
// adding up the numbers of one vector takes twelve. Images that only fill a block up do not count.
template <typename T, int N, int Size = lanes<T> / 2>
[[gnu::always_inline]] inline Vec<T> add_parts(const Vec<T>* x) {
    if constexpr (Size == 0) {
        return x[0];
    } else {
        constexpr auto all = std::make_integer_sequence<int, lanes<T>>{};
        Vec<T> halves[(N + 1) / 2];
        #pragma GCC unroll 32
        for (int n = 0; n < N; n += 2) {
            const Vec<T> a = x[n], b = x[n + 1 < N ? n + 1 : n];
            halves[n / 2] = segments<T, Size, 0>(a, b, all) + segments<T, Size, 1>(a, b, all);
        }
        return add_parts<T, (N + 1) / 2, Size / 2>(halves);
    }
}
template <typename T, int N>
[[gnu::always_inline]] inline Vec<T> sums(Vec<T>* x, int64_t images) {
    if (images < lanes<T>)
        for (int n = 0; n < N; ++n)
            for (int64_t i = images; i < lanes<T>; ++i) x[n][i] = T(0);
    return add_parts<T, N>(x);
}
template <typename T> inline T sum(Vec<T> x, int64_t images) { return sums<T, 1>(&x, images)[0]; }

// Elementwise functions; a comparison with NaN is false.
template <typename T> inline Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) { return m ? a : b; }
template <typename T> inline Mask<T> is_nan(Vec<T> x) { return x != x; }
template <typename T> inline Vec<T> relu(Vec<T> x) { return x < T(0) ? Vec<T>{} : x; }
template <typename T> inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
    return ((a > b) | (a != a)) ? a : b;
}
template <typename T> inline Vec<T> minimum(Vec<T> a, Vec<T> b) {
    return ((a < b) | (a != a)) ? a : b;
}
inline Vec<float> absolute(Vec<float> x) { return (Vec<float>)((Mask<float>)x & INT32_MAX); }
inline Vec<double> absolute(Vec<double> x) { return (Vec<double>)((Mask<double>)x & INT64_MAX); }
inline Vec<float> squareroot(Vec<float> x) {
#ifdef FDL_AVX512
    return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < lanes<float>; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}
inline Vec<double> squareroot(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::sqrt(x[i]);
    return x;
}

// Memory of a thread for the activations of a block; it stays, and is shared by all kernels.
inline void* scratch(int64_t size) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local int64_t held = 0;
    if (size > held) {
        memory.reset(new char[size + bytes]);
        held = size;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return reinterpret_cast<void*>((address + bytes - 1) / bytes * bytes);
}

}  // namespace fdl_blocks
#endif
