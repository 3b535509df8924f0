// Layers on one block of images: x[channel][row][column][image].
#ifndef FDL_BLOCKS_LAYERS
#define FDL_BLOCKS_LAYERS

namespace fdl_blocks {

// From `images` rows of `size` numbers to size × lanes, and back. What is left of a block repeats
// its last image, so that no number comes up that no image has.
template <typename T>
inline void load_block(T* to, const T* x, int64_t size, int64_t images) {
    constexpr int L = lanes<T>;
    const T* rows[L];
    for (int n = 0; n < L; ++n) rows[n] = x + (n < images ? n : images - 1) * size;
    for (int64_t i = 0; i < size; ++i) {
        #pragma GCC unroll 16
        for (int n = 0; n < L; ++n) to[i * L + n] = rows[n][i];
    }
}
template <typename T>
inline void load_flags(T* to, const bool* x, int64_t size, int64_t images) {
    constexpr int L = lanes<T>;
    for (int64_t i = 0; i < size; ++i)
        for (int n = 0; n < L; ++n) to[i * L + n] = x[(n < images ? n : images - 1) * size + i];
}
template <typename T>
inline void store_block(const T* x, T* to, int64_t size, int64_t images) {
    constexpr int L = lanes<T>;
    if (images == L) {
        for (int64_t i = 0; i < size; ++i) {
            #pragma GCC unroll 16
            for (int n = 0; n < L; ++n) to[n * size + i] = x[i * L + n];
        }
    } else {
        for (int64_t n = 0; n < images; ++n)
            for (int64_t i = 0; i < size; ++i) to[n * size + i] = x[i * L + n];
    }
}
// A convolution: channels and outputs of a group, of an image that has its padding around it.
template <int Groups, int C, int H, int W, int O, int KH, int KW, int SH, int SW, int DH, int DW>
struct Shape {
    static constexpr int groups = Groups, c = C, h = H, w = W, o = O, kh = KH, kw = KW, sh = SH,
                         sw = SW, dh = DH, dw = DW;
    static constexpr int oh = (H - DH * (KH - 1) - 1) / SH + 1;
    static constexpr int ow = (W - DW * (KW - 1) - 1) / SW + 1;
};

// A frame of zeros around each channel, and `gap − 1` zeros between rows and columns.
template <typename T, int C, int H, int W, int Top, int Left, int NewH, int NewW, int GapH, int GapW>
inline void frame(const T* x, T* to) {
    constexpr int L = lanes<T>;
    std::memset(to, 0, sizeof(T) * C * NewH * NewW * L);
    for (int c = 0; c < C; ++c)
        for (int i = 0; i < H; ++i) {
            const int row = Top + i * GapH;
            if (row < 0 || row >= NewH) continue;
            for (int j = 0; j < W; ++j) {
                const int column = Left + j * GapW;
                if (column < 0 || column >= NewW) continue;
                store(to + ((int64_t(c) * NewH + row) * NewW + column) * L,
                      load(x + ((int64_t(c) * H + i) * W + j) * L));
            }
        }
}

// Weights as [group][tile of outputs][channel][row][column][output of the tile].
template <typename T, class S, int Tile> inline void pack(const T* w, T* to) {
    for (int g = 0; g < S::groups; ++g)
        for (int first = 0; first < S::o; first += Tile) {
            const int tile = S::o - first < Tile ? S::o - first : Tile;
            for (int k = 0; k < S::c * S::kh * S::kw; ++k)
                for (int o = 0; o < tile; ++o)
                    *to++ = w[(int64_t(g) * S::o + first + o) * S::c * S::kh * S::kw + k];
        }
}
// Those of the derivative by the input: channels and outputs exchanged, turned by half a turn.
// S is the shape of that convolution: its outputs are the channels of w.
template <typename T, class S, int Tile> inline void pack_turned(const T* w, T* to) {
    for (int g = 0; g < S::groups; ++g)
        for (int first = 0; first < S::o; first += Tile) {
            const int tile = S::o - first < Tile ? S::o - first : Tile;
            for (int c = 0; c < S::c; ++c)
                for (int k = S::kh * S::kw - 1; k >= 0; --k)
                    for (int o = 0; o < tile; ++o)
                        *to++ = w[((int64_t(g) * S::c + c) * S::o + first + o) * S::kh * S::kw + k];
        }
}

// `Outputs` channels of the result at `Columns` neighbouring pixels, in registers.
template <typename T, class S, int Outputs, int Columns>
inline void convolve_tile(const T* x, const T* w, const T* bias, T* y) {
    constexpr int L = lanes<T>;
    Vec<T> sums[Outputs][Columns];
    #pragma GCC unroll 32
    for (int o = 0; o < Outputs; ++o) {
        const Vec<T> start = bias ? splat(bias[o]) : Vec<T>{};
        #pragma GCC unroll 32
        for (int j = 0; j < Columns; ++j) sums[o][j] = start;
    }
    for (int c = 0; c < S::c; ++c)
        for (int p = 0; p < S::kh; ++p) {
            const T* row = x + (int64_t(c) * S::h + p * S::dh) * S::w * L;
            for (int q = 0; q < S::kw; ++q, w += Outputs) {
                Vec<T> pixels[Columns];
                #pragma GCC unroll 32
                for (int j = 0; j < Columns; ++j)
                    pixels[j] = load(row + (q * S::dw + j * S::sw) * L);
                #pragma GCC unroll 32
                for (int o = 0; o < Outputs; ++o) {
                    const Vec<T> weight = splat(w[o]);
                    #pragma GCC unroll 32
                    for (int j = 0; j < Columns; ++j)
                        sums[o][j] = fma(weight, pixels[j], sums[o][j]);
                }
            }
        }
    #pragma GCC unroll 32
    for (int o = 0; o < Outputs; ++o)
        #pragma GCC unroll 32
        for (int j = 0; j < Columns; ++j)
            store(y + (int64_t(o) * S::oh * S::ow + j) * L, sums[o][j]);
}

template <typename T, class S, int Outputs, int Columns>
inline void convolve_row(const T* x, const T* w, const T* bias, T* y) {
    constexpr int L = lanes<T>, left = S::ow % Columns;
    int j = 0;
    for (; j + Columns <= S::ow; j += Columns)
        convolve_tile<T, S, Outputs, Columns>(x + j * S::sw * L, w, bias, y + j * L);
    if constexpr (left)
        convolve_tile<T, S, Outputs, left>(x + j * S::sw * L, w, bias, y + j * L);
}

template <typename T, class S, int Outputs, int Columns>
inline void convolve(const T* x, const T* w, const T* bias, T* y) {
    constexpr int L = lanes<T>, left = S::o % Outputs;
    constexpr int64_t weights = int64_t(S::c) * S::kh * S::kw, pixels = S::oh * S::ow;
    for (int g = 0; g < S::groups; ++g) {
        for (int i = 0; i < S::oh; ++i) {
            const T* from = x + int64_t(i) * S::sh * S::w * L;
            T* to = y + int64_t(i) * S::ow * L;
            int o = 0;
            for (; o + Outputs <= S::o; o += Outputs)
                convolve_row<T, S, Outputs, Columns>(from, w + o * weights, bias ? bias + o : bias,
                                                     to + o * pixels * L);
            if constexpr (left)
                convolve_row<T, S, left, Columns>(from, w + o * weights, bias ? bias + o : bias,
                                                  to + o * pixels * L);
        }
        x += int64_t(S::c) * S::h * S::w * L;
        w += S::o * weights;
        y += S::o * pixels * L;
        if (bias) bias += S::o;
    }
}

// The derivative by the weights of `Outputs` outputs and `Channels` channels, in one kernel row.
template <typename T, class S, int Outputs, int Channels>
inline void weights_tile(const T* x, const T* grad, T* totals, int64_t images) {
    constexpr int L = lanes<T>;
    Vec<T> sums[Outputs][Channels][S::kw] = {};
    for (int i = 0; i < S::oh; ++i) {
        const T* row = x + int64_t(i) * S::sh * S::w * L;
        const T* grads = grad + int64_t(i) * S::ow * L;
        for (int j = 0; j < S::ow; ++j) {
            Vec<T> pixels[Channels][S::kw];
            #pragma GCC unroll 32
            for (int c = 0; c < Channels; ++c)
                #pragma GCC unroll 32
                for (int q = 0; q < S::kw; ++q)
                    pixels[c][q] = load(row + (int64_t(c) * S::h * S::w + j * S::sw + q * S::dw) * L);
            #pragma GCC unroll 32
            for (int o = 0; o < Outputs; ++o) {
                const Vec<T> g = load(grads + (int64_t(o) * S::oh * S::ow + j) * L);
                #pragma GCC unroll 32
                for (int c = 0; c < Channels; ++c)
                    #pragma GCC unroll 32
                    for (int q = 0; q < S::kw; ++q)
                        sums[o][c][q] = fma(g, pixels[c][q], sums[o][c][q]);
            }
        }
    }
    for (int o = 0; o < Outputs; ++o)
        for (int c = 0; c < Channels; ++c)
            for (int q = 0; q < S::kw; ++q)
                totals[(int64_t(o) * S::c + c) * S::kh * S::kw + q] += sum<T>(sums[o][c][q], images);
}

template <typename T, class S, int Outputs, int Channels>
inline void weights_of_outputs(const T* x, const T* grad, T* sums, int64_t images) {
    constexpr int L = lanes<T>, left = S::c % Channels;
    for (int p = 0; p < S::kh; ++p) {
        const T* rows = x + int64_t(p) * S::dh * S::w * L;
        T* to = sums + p * S::kw;
        int c = 0;
        for (; c + Channels <= S::c; c += Channels)
            weights_tile<T, S, Outputs, Channels>(rows + int64_t(c) * S::h * S::w * L, grad,
                                                  to + int64_t(c) * S::kh * S::kw, images);
        if constexpr (left)
            weights_tile<T, S, Outputs, left>(rows + int64_t(c) * S::h * S::w * L, grad,
                                              to + int64_t(c) * S::kh * S::kw, images);
    }
}

template <typename T, class S, int Outputs, int Channels>
inline void convolve_weights(const T* x, const T* grad, T* sums, int64_t images) {
    constexpr int L = lanes<T>, left = S::o % Outputs;
    constexpr int64_t weights = int64_t(S::c) * S::kh * S::kw, pixels = S::oh * S::ow;
    for (int g = 0; g < S::groups; ++g) {
        int o = 0;
        for (; o + Outputs <= S::o; o += Outputs)
            weights_of_outputs<T, S, Outputs, Channels>(x, grad + o * pixels * L, sums + o * weights, images);
        if constexpr (left)
            weights_of_outputs<T, S, left, Channels>(x, grad + o * pixels * L, sums + o * weights, images);
        x += int64_t(S::c) * S::h * S::w * L;
        grad += S::o * pixels * L;
        sums += S::o * weights;
    }
}

// Sums of each of `count` rows of `size` numbers over the images: of a bias, say.
template <typename T>
inline void sum_rows(const T* x, int64_t count, int64_t size, T* sums, int64_t images) {
    constexpr int L = lanes<T>;
    for (int64_t c = 0; c < count; ++c) {
        Vec<T> parts[4] = {};
        int64_t i = 0;
        for (; i + 4 <= size; i += 4)
            for (int k = 0; k < 4; ++k) parts[k] += load(x + (c * size + i + k) * L);
        for (; i < size; ++i) parts[0] += load(x + (c * size + i) * L);
        sums[c] += sum<T>((parts[0] + parts[1]) + (parts[2] + parts[3]), images);
    }
}

// The totals of all threads, in their order.
template <typename T>
inline void add_up(const T* totals, int64_t stride, int threads, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) {
        T sum = totals[i];
        for (int t = 1; t < threads; ++t) sum += totals[t * stride + i];
        to[i] = sum;
    }
}

// A pooling: windows may overlap, and reach beyond the image.
template <int C, int H, int W, int OH, int OW, int KH, int KW, int SH, int SW, int PH, int PW, int DH,
          int DW>
struct Pool {
    static constexpr int c = C, h = H, w = W, oh = OH, ow = OW, kh = KH, kw = KW, sh = SH, sw = SW,
                         ph = PH, pw = PW, dh = DH, dw = DW;
    // Calls f(position) for each pixel of a window.
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
                if (fits && fits_too) f(row * W + column);
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
    for (int c = 0; c < P::c; ++c, x += int64_t(P::h) * P::w * L)
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, y += L) {
                Vec<T> total{};
                P::each(i, j, [&](int at) { total += load(x + int64_t(at) * L); });
                store(y, total / T(Divisor ? Divisor : P::area(i, j, CountPadding)));
            }
}
template <typename T, class P, int Divisor, bool CountPadding>
inline void average_pool_backward(const T* grad, T* to) {
    constexpr int L = lanes<T>;
    std::memset(to, 0, sizeof(T) * P::c * P::h * P::w * L);
    for (int c = 0; c < P::c; ++c, to += int64_t(P::h) * P::w * L)
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, grad += L) {
                const Vec<T> share =
                    load(grad) / T(Divisor ? Divisor : P::area(i, j, CountPadding));
                P::each(i, j, [&](int at) {
                    T* pixel = to + int64_t(at) * L;
                    store(pixel, load(pixel) + share);
                });
            }
}

// As in torch, NaN is a maximum, and of equal numbers the first.
template <typename T> inline Mask<T> is_larger(Vec<T> x, Vec<T> best) {
    return (x > best) | (x != x);
}
template <typename T, class P> inline void max_pool(const T* x, T* y) {
    constexpr int L = lanes<T>;
    for (int c = 0; c < P::c; ++c, x += int64_t(P::h) * P::w * L)
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, y += L) {
                Vec<T> best = splat(T(-INFINITY));
                P::each(i, j, [&](int at) {
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
    std::memset(to, 0, sizeof(T) * P::c * P::h * P::w * L);
    for (int c = 0; c < P::c; ++c, x += int64_t(P::h) * P::w * L, to += int64_t(P::h) * P::w * L)
        for (int i = 0; i < P::oh; ++i)
            for (int j = 0; j < P::ow; ++j, grad += L) {
                Vec<T> best = splat(T(-INFINITY));
                M place{};
                bool first = true;  // pixel of a window, which has the gradient if all are −∞
                P::each(i, j, [&](int at) {
                    const Vec<T> pixel = load(x + int64_t(at) * L);
                    const M larger = first ? ~M{} : is_larger<T>(pixel, best);
                    first = false;
                    best = larger ? pixel : best;
                    place = larger ? M{} + at : place;
                });
                const Vec<T> g = load(grad);
                P::each(i, j, [&](int at) {
                    T* pixel = to + int64_t(at) * L;
                    store(pixel, load(pixel) + (place == M{} + at ? g : Vec<T>{}));
                });
            }
}

// Mean and squared deviations of a channel over pixels and images, merged block by block.
// Source: Chan, Golub & LeVeque, 1979. `parts` is [channel][mean, deviations][image].
template <typename T>
inline void merge_moments(T* parts, Vec<T> mean, Vec<T> squares, T count, T more) {
    constexpr int L = lanes<T>;
    const Vec<T> delta = mean - load(parts);
    store(parts, load(parts) + delta * (more / (count + more)));
    store(parts + L, load(parts + L) + squares + delta * delta * (count * more / (count + more)));
}
template <typename T>
inline void add_moments(const T* x, int64_t channels, int64_t size, int64_t blocks, T* parts,
                        int64_t images) {
    constexpr int L = lanes<T>;
    T old[2 * L];
    for (int64_t c = 0; c < channels; ++c, x += size * L, parts += 2 * L) {
        Vec<T> total{}, squares{};
        for (int64_t i = 0; i < size; ++i) total += load(x + i * L);
        const Vec<T> mean = total / T(size);
        for (int64_t i = 0; i < size; ++i) {
            const Vec<T> off = load(x + i * L) - mean;
            squares = fma(off, off, squares);
        }
        std::memcpy(old, parts, sizeof old);
        merge_moments<T>(parts, mean, squares, T(size * blocks), T(size));
        for (int64_t n = images; n < L; ++n) parts[n] = old[n], parts[L + n] = old[L + n];
    }
}
// The moments of all threads: of `count(thread, image)` numbers each.
template <typename T, class F>
inline void finish_moments(const T* parts, int64_t stride, int threads, int64_t channels, F count,
                           T correction, T* variance, T* mean) {
    constexpr int L = lanes<T>;
    for (int64_t c = 0; c < channels; ++c) {
        T all = 0, m = 0, squares = 0;
        for (int t = 0; t < threads; ++t)
            for (int n = 0; n < L; ++n) {
                const T more = count(t, n);
                if (more == 0) continue;
                const T* part = parts + t * stride + c * 2 * L + n;
                const T delta = part[0] - m;
                m += delta * (more / (all + more));
                squares += part[L] + delta * delta * (all * more / (all + more));
                all += more;
            }
        variance[c] = squares / (all > correction ? all - correction : T(0));
        mean[c] = m;
    }
}

}  // namespace fdl_blocks
#endif
