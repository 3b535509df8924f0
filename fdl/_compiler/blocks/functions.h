// Functions of each number of a vector.
#ifndef FDL_BLOCKS_FUNCTIONS
#define FDL_BLOCKS_FUNCTIONS

namespace fdl_blocks {

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

}  // namespace fdl_blocks
#endif
