// Vectors of as many numbers as a register holds, one number of each image of a block.
#ifndef FDL_BLOCKS_VECTORS
#define FDL_BLOCKS_VECTORS
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
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

// The sum over the images of a block, by halves.
template <typename T> inline T sum(Vec<T> x, int64_t images) {
    T parts[lanes<T>];
    __builtin_memcpy(parts, &x, bytes);
    for (int64_t i = images; i < lanes<T>; ++i) parts[i] = T(0);
    #pragma GCC unroll 8
    for (int half = lanes<T> / 2; half; half /= 2) {
        #pragma GCC unroll 8
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    }
    return parts[0];
}

// Elementwise functions; a comparison with NaN is false.
template <typename T> inline Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) { return m ? a : b; }
template <typename T> inline Mask<T> is_nan(Vec<T> x) { return x != x; }
template <typename T> inline Vec<T> relu(Vec<T> x) { return x < T(0) ? Vec<T>{} : x; }
template <typename T> inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
    return (a > b) | (a != a) ? a : b;
}
template <typename T> inline Vec<T> minimum(Vec<T> a, Vec<T> b) {
    return (a < b) | (a != a) ? a : b;
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

// exp(x) = 2ⁿ exp(r), |r| ≤ ln 2 / 2: a polynomial of Cephes. 2ⁿ in two factors, for subnormals.
inline Vec<float> exponential(Vec<float> x) {
    typedef Vec<float> V;
    typedef Mask<float> I;
    const V most = splat(89.0f), least = splat(-104.0f);
    V y = x > most ? most : x;
    y = y < least ? least : y;
    const V magic = splat(12582912.0f);  // 1.5 · 2²³: the sum is rounded to an integer
    const V n = (y * 1.44269504f + magic) - magic;
    V r = fma(n, splat(-0.693359375f), y);
    r = fma(n, splat(2.12194440e-4f), r);
    V p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const I power = __builtin_convertvector(n, I), half = power >> 1;
    return p * (V)((half + 127) << 23) * (V)((power - half + 127) << 23);
}
inline Vec<double> exponential(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}
template <typename T> inline Vec<T> sigmoid(Vec<T> x) {
    return T(1) / (T(1) + exponential(-x));
}
// tanh(x) by exp(−2|x|); near zero, where that cancels, by a polynomial of Cephes.
inline Vec<float> hyperbolic_tangent(Vec<float> x) {
    typedef Vec<float> V;
    const V size = absolute(x), e = exponential(-2.0f * size);
    const V far = (1.0f - e) / (1.0f + e), z = x * x;
    V p = splat(-5.70498872745e-3f);
    p = fma(p, z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    return size < 0.625f ? fma(p * z, x, x) : (x < 0.0f ? -far : far);
}
inline Vec<double> hyperbolic_tangent(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::tanh(x[i]);
    return x;
}
template <typename T> inline Vec<T> logarithm(Vec<T> x) {
    for (int i = 0; i < lanes<T>; ++i) x[i] = std::log(x[i]);
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
