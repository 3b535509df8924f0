// Pooling of one block of images, and its derivatives.
#ifndef FDL_BLOCKS_POOLS
#define FDL_BLOCKS_POOLS

namespace fdl_blocks {

// A pooling: windows may overlap, and reach beyond the image.
template <int C, int H, int W, int OH, int OW, int KH, int KW, int SH, int SW, int PH, int PW, int DH,
          int DW>
struct Pool {
    static constexpr int c = C, h = H, w = W, oh = OH, ow = OW, kh = KH, kw = KW, sh = SH, sw = SW,
                         ph = PH, pw = PW, dh = DH, dw = DW;
    // Windows that are apart write each pixel once; those that cover an image write all of it.
    static constexpr bool apart = (KH - 1) * DH < SH && (KW - 1) * DW < SW;
    static constexpr bool covers = KH == SH && KW == SW && !PH && !PW && DH == 1 && DW == 1 &&
                                   OH * SH >= H && OW * SW >= W;
    static constexpr int64_t pixels = int64_t(H) * W;
    // Calls f(position, number) for each pixel of a window.
    template <class F> static inline void each(int i, int j, F f) {
        #pragma GCC unroll 8
        for (int p = 0; p < KH; ++p) {
            const int row = i * SH - PH + p * DH;
            #pragma GCC unroll 8
            for (int q = 0; q < KW; ++q) {
                const int column = j * SW - PW + q * DW;
                const bool fits = (!PH && (OH - 1) * SH + (KH - 1) * DH < H) ||
                                  (row >= 0 && row < H);
                const bool fits_too = (!PW && (OW - 1) * SW + (KW - 1) * DW < W) ||
                                      (column >= 0 && column < W);
                if (fits && fits_too) f(row * W + column, p * KW + q);
            }
        }
    }
    // The divisor of an average: of the window as far as the padding reaches, or the image.
    static inline int area(int i, int j, bool count_padding) {
        int top = i * SH - PH, left = j * SW - PW;
        int bottom = top + KH < H + PH ? top + KH : H + PH;
        int right = left + KW < W + PW ? left + KW : W + PW;
        if (!count_padding) {
            top = top > 0 ? top : 0;
            left = left > 0 ? left : 0;
            bottom = bottom < H ? bottom : H;
            right = right < W ? right : W;
        }
        return (bottom - top) * (right - left);
    }
};

template <typename T, class P, int Divisor, bool CountPadding>
inline void average_pool(const T* x, T* y) {
    constexpr int L = lanes<T>;
    for (int c = 0; c < P::c; ++c, x += P::pixels * L)
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, y += L) {
                Vec<T> total{};
                P::each(i, j, [&](int at, int) { total += load(x + int64_t(at) * L); });
                store(y, total / T(Divisor ? Divisor : P::area(i, j, CountPadding)));
            }
}
template <typename T, class P, int Divisor, bool CountPadding>
inline void average_pool_backward(const T* grad, T* to) {
    constexpr int L = lanes<T>;
    for (int c = 0; c < P::c; ++c, to += P::pixels * L) {
        if (!P::covers) std::memset(to, 0, sizeof(T) * P::pixels * L);
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, grad += L) {
                const Vec<T> share =
                    load(grad) / T(Divisor ? Divisor : P::area(i, j, CountPadding));
                P::each(i, j, [&](int at, int) {
                    T* pixel = to + int64_t(at) * L;
                    store(pixel, P::apart ? share : load(pixel) + share);
                });
            }
    }
}

// As in torch, NaN is a maximum, and of equal numbers the first.
template <typename T> inline Mask<T> is_larger(Vec<T> x, Vec<T> best) {
    return (x > best) | (x != x);
}
template <typename T, class P> inline void max_pool(const T* x, T* y) {
    constexpr int L = lanes<T>;
    for (int c = 0; c < P::c; ++c, x += P::pixels * L)
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, y += L) {
                Vec<T> best = splat(T(-INFINITY));
                P::each(i, j, [&](int at, int) {
                    const Vec<T> pixel = load(x + int64_t(at) * L);
                    best = is_larger<T>(pixel, best) ? pixel : best;
                });
                store(y, best);
            }
}
template <typename T, class P>
inline void max_pool_backward(const T* x, const T* grad, T* to) {
    constexpr int L = lanes<T>;
    typedef Mask<T> M;
    for (int c = 0; c < P::c; ++c, x += P::pixels * L, to += P::pixels * L) {
        if (!P::covers) std::memset(to, 0, sizeof(T) * P::pixels * L);
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, grad += L) {
                Vec<T> best{};
                M place{};
                bool first = true;  // pixel of a window, which has the gradient if all are −∞
                P::each(i, j, [&](int at, int number) {
                    const Vec<T> pixel = load(x + int64_t(at) * L);
                    const M larger = first ? ~M{} : is_larger<T>(pixel, best);
                    first = false;
                    best = larger ? pixel : best;
                    place = larger ? M{} + number : place;
                });
                const Vec<T> g = load(grad);
                P::each(i, j, [&](int at, int number) {
                    T* pixel = to + int64_t(at) * L;
                    const Vec<T> part = place == M{} + number ? g : Vec<T>{};
                    store(pixel, P::apart ? part : load(pixel) + part);
                });
            }
    }
}

}  // namespace fdl_blocks
#endif
