// Functions of each number of a vector.
#ifndef FDL_BLOCKS_FUNCTIONS
#define FDL_BLOCKS_FUNCTIONS

namespace fdl_blocks {

// exp(x) = 2ⁿ exp(r), |r| ≤ ln 2 / 2: a polynomial of Cephes.
inline Vec<float> exponential(Vec<float> x) {
    typedef Vec<float> V;
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
#ifdef FDL_AVX512
    return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    typedef Mask<float> I;
    const I power = __builtin_convertvector(n, I), half = power >> 1;  // 2ⁿ in two factors: 2¹²⁸ is ∞
    return p * (V)((half + 127) << 23) * (V)((power - half + 127) << 23);
#endif
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

// log(2ⁿ (1 + f)) = n ln 2 + log(1 + f), −1/3 ≤ f ≤ 1/3. Source: N. Juffa, "Accuracy of logf", 2017.
inline Vec<float> logarithm(Vec<float> x) {
    typedef Vec<float> V;
    typedef Mask<float> I;
    const auto is_small = x < 1.17549435e-38f;  // subnormal: first made larger by 2²³
    const V y = is_small ? x * 8388608.0f : x;
    const I shift = ((I)y - 0x3f2aaaab) & (int32_t)0xff800000;
    const V f = (V)((I)y - shift) - 1.0f, z = f * f;
    const V n = __builtin_convertvector(shift >> 23, V) - (is_small ? splat(23.0f) : V{});
    V p = fma(splat(-1.30310059e-1f), z, splat(-1.21483438e-1f));
    V q = fma(splat(1.40869141e-1f), z, splat(1.39814854e-1f));
    p = fma(p, z, splat(-1.66846052e-1f));
    q = fma(q, z, splat(2.00120345e-1f));
    p = fma(p, z, splat(-2.49996200e-1f));
    p = fma(q, f, p);
    p = fma(p, f, splat(3.33331972e-1f));
    p = fma(p, f, splat(-0.5f));
    p = fma(n, splat(0.693147182f), fma(p, z, f));
    const V of_zero = x == 0.0f ? splat(-INFINITY) : splat(NAN);
    const V outside = x > 0.0f ? x : (x == x ? of_zero : x);
    return ((x > 0.0f) & (x < INFINITY)) ? p : outside;
}
inline Vec<double> logarithm(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::log(x[i]);
    return x;
}

// erf(x): near zero x + x P(x²), else 1 − exp(Q(|x|)). Source: N. Juffa, "Implementation of erff", 2015.
inline Vec<float> error_function(Vec<float> x) {
    typedef Vec<float> V;
    const V size = absolute(x), z = x * x;
    V p = splat(-5.96761703e-4f);
    p = fma(p, z, splat(4.99119423e-3f));
    p = fma(p, z, splat(-2.67681349e-2f));
    p = fma(p, z, splat(1.12819925e-1f));
    p = fma(p, z, splat(-3.76125336e-1f));
    p = fma(p, z, splat(1.28379166e-1f));
    V q = fma(splat(-1.72853470e-5f), size, splat(3.83197126e-4f));
    q = fma(q, z, fma(splat(-3.88396438e-3f), size, splat(2.42546219e-2f)));
    q = fma(q, size, splat(-1.06777877e-1f));
    q = fma(q, size, splat(-6.34846687e-1f));
    q = fma(q, size, splat(-1.28717512e-1f));
    const V far = 1.0f - exponential(fma(q, size, -size));
    return size < 0.927734375f ? fma(p, x, x) : (x < 0.0f ? -far : far);
}
inline Vec<double> error_function(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::erf(x[i]);
    return x;
}

}  // namespace fdl_blocks
#endif
