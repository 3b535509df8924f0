// Convolutions of one block of images, and their derivatives.
#ifndef FDL_BLOCKS_CONVOLUTIONS
#define FDL_BLOCKS_CONVOLUTIONS

namespace fdl_blocks {

// A convolution of `H` rows of `W` numbers, which already have their padding at the left and right;
// channels and outputs are those of a group. Row i of the result reads the rows i SH + p DH − Top of
// an image in which the rows are GapH apart: so does the derivative by the input of a convolution
// with strides. Nothing is multiplied by the zeros between the rows and columns, or above and below.
template <int Groups, int C, int H, int W, int O, int OH, int OW, int KH, int KW, int SH, int SW,
          int DH, int DW, int Top, int Left, int GapH, int GapW>
struct Shape {
    static constexpr int groups = Groups, c = C, h = H, w = W, o = O, oh = OH, ow = OW, kh = KH,
                         kw = KW, sw = SW, dw = DW, gap = GapW;
    static constexpr int64_t weights = int64_t(C) * KH * KW, pixels = int64_t(OH) * OW;
    // The row that row `p` of the kernel reads for row `i` of the result, or −1.
    static constexpr int row(int i, int p) {
        const int at = i * SH + p * DH - Top;
        return at < 0 || at % GapH || at / GapH >= H ? -1 : at / GapH;
    }
    // Columns `phase`, `phase + gap`, … of the result read only every `step`-th column of the kernel.
    static constexpr int step = GapW / std::gcd(GapW, DW);
    static constexpr int first(int phase) {
        int q = 0;
        while (q < step && (phase + q * DW - Left) % GapW) ++q;
        return q < step ? q : KW;
    }
    // The column that column `q` of the kernel reads for column `phase` of the result.
    static constexpr int column(int phase, int q) {
        constexpr int before = Left > 0 ? (Left + GapW - 1) / GapW : -(-Left / GapW);
        return (phase + q * DW - Left + before * GapW) / GapW;
    }
};

// Zeros at the left and right of rows; a negative `Left` leaves columns out.
template <typename T, int Rows, int W, int Left, int NewW> inline void frame(const T* x, T* to) {
    constexpr int L = lanes<T>, end = Left + W < NewW ? Left + W : NewW;
    for (int i = 0; i < Rows; ++i, x += W * L, to += NewW * L)
        for (int j = 0; j < NewW; ++j)
            store(to + j * L, j >= Left && j < end ? load(x + (j - Left) * L) : Vec<T>{});
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

// The rows of the kernel that read a row of the image for a row of the result, and which.
template <class S> struct Rows {
    int count = 0, kernel[S::kh], image[S::kh];
    explicit Rows(int i) {
        for (int p = 0; p < S::kh; ++p)
            if (S::row(i, p) >= 0) kernel[count] = p, image[count++] = S::row(i, p);
    }
};

// `Outputs` channels of the result at `Columns` neighbouring pixels of a phase, in registers.
template <typename T, class S, int Outputs, int Columns, bool Relu, int Phase>
inline void convolve_tile(const Rows<S>& rows, const T* x, const T* w, const T* bias, T* y) {
    constexpr int L = lanes<T>;
    Vec<T> sums[Outputs][Columns];
    #pragma GCC unroll 32
    for (int o = 0; o < Outputs; ++o) {
        const Vec<T> start = bias ? splat(bias[o]) : Vec<T>{};
        #pragma GCC unroll 32
        for (int j = 0; j < Columns; ++j) sums[o][j] = start;
    }
    for (int c = 0; c < S::c; ++c)
        for (int k = 0; k < rows.count; ++k) {
            const T* row = x + (int64_t(c) * S::h + rows.image[k]) * S::w * L;
            const T* weights = w + (c * S::kh + rows.kernel[k]) * S::kw * Outputs;
            for (int q = S::first(Phase); q < S::kw; q += S::step) {
                Vec<T> pixels[Columns];
                #pragma GCC unroll 32
                for (int j = 0; j < Columns; ++j)
                    pixels[j] = load(row + (S::column(Phase, q) + j * S::sw) * L);
                #pragma GCC unroll 32
                for (int o = 0; o < Outputs; ++o) {
                    const Vec<T> weight = broadcast(weights + q * Outputs + o);
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
            store(y + (o * S::pixels + j * S::gap) * L, Relu ? relu<T>(sums[o][j]) : sums[o][j]);
}

template <typename T, class S, int Outputs, int Columns, bool Relu, int Phase = 0>
inline void convolve_row(const Rows<S>& rows, const T* x, const T* w, const T* bias, T* y) {
    constexpr int L = lanes<T>, columns = (S::ow - Phase + S::gap - 1) / S::gap;
    constexpr int left = columns % Columns;
    int j = 0;
    for (; j + Columns <= columns; j += Columns)
        convolve_tile<T, S, Outputs, Columns, Relu, Phase>(rows, x + j * S::sw * L, w, bias,
                                                           y + (j * S::gap + Phase) * L);
    if constexpr (left)
        convolve_tile<T, S, Outputs, left, Relu, Phase>(rows, x + j * S::sw * L, w, bias,
                                                        y + (j * S::gap + Phase) * L);
    if constexpr (Phase + 1 < S::gap && Phase + 1 < S::ow)
        convolve_row<T, S, Outputs, Columns, Relu, Phase + 1>(rows, x, w, bias, y);
}

template <typename T, class S, int Outputs, int Columns, bool Relu = false>
inline void convolve(const T* x, const T* w, const T* bias, T* y) {
    constexpr int L = lanes<T>, left = S::o % Outputs;
    for (int g = 0; g < S::groups; ++g) {
        for (int i = 0; i < S::oh; ++i) {
            const Rows<S> rows(i);
            T* to = y + int64_t(i) * S::ow * L;
            int o = 0;
            for (; o + Outputs <= S::o; o += Outputs)
                convolve_row<T, S, Outputs, Columns, Relu>(
                    rows, x, w + o * S::weights, bias ? bias + o : bias, to + o * S::pixels * L);
            if constexpr (left)
                convolve_row<T, S, left, Columns, Relu>(
                    rows, x, w + o * S::weights, bias ? bias + o : bias, to + o * S::pixels * L);
        }
        x += int64_t(S::c) * S::h * S::w * L;
        w += S::o * S::weights;
        y += S::o * S::pixels * L;
        if (bias) bias += S::o;
    }
}

// Adds the sums over the images of N products, [output][channel][column], to the totals of weights.
template <typename T, class S, int Channels, int Columns, int N, int Start = 0>
[[gnu::always_inline]] inline void add_to_totals(Vec<T>* products, T* totals, int64_t images) {
    constexpr int count = N - Start < lanes<T> ? N - Start : lanes<T>;
    T added[lanes<T>];
    store(added, sums<T, count>(products + Start, images));
    #pragma GCC unroll 32
    for (int n = 0; n < count; ++n) {
        const int row = (Start + n) / Columns, o = row / Channels, c = row % Channels;
        totals[o * S::weights + c * S::kh * S::kw + (Start + n) % Columns] += added[n];
    }
    if constexpr (Start + count < N)
        add_to_totals<T, S, Channels, Columns, N, Start + count>(products, totals, images);
}

// The derivative by `Columns` neighbours in row `p` of the kernels of some outputs and channels.
template <typename T, class S, int Outputs, int Channels, int Columns>
inline void weights_tile(const T* x, const T* grad, T* totals, int p, int64_t images) {
    constexpr int L = lanes<T>, N = Outputs * Channels * Columns;
    Vec<T> products[N] = {};
    for (int i = 0; i < S::oh; ++i) {
        if (S::row(i, p) < 0) continue;
        const T* row = x + int64_t(S::row(i, p)) * S::w * L;
        const T* grads = grad + int64_t(i) * S::ow * L;
        for (int j = 0; j < S::ow; ++j) {
            Vec<T> pixels[Channels][Columns];
            #pragma GCC unroll 32
            for (int c = 0; c < Channels; ++c)
                #pragma GCC unroll 32
                for (int q = 0; q < Columns; ++q)
                    pixels[c][q] = load(row + (int64_t(c) * S::h * S::w + j * S::sw + q * S::dw) * L);
            #pragma GCC unroll 32
            for (int o = 0; o < Outputs; ++o) {
                const Vec<T> g = load(grads + (o * S::pixels + j) * L);
                #pragma GCC unroll 32
                for (int c = 0; c < Channels; ++c)
                    #pragma GCC unroll 32
                    for (int q = 0; q < Columns; ++q) {
                        Vec<T>& product = products[(o * Channels + c) * Columns + q];
                        product = fma(g, pixels[c][q], product);
                    }
            }
        }
    }
    add_to_totals<T, S, Channels, Columns, N>(products, totals, images);
}

template <typename T, class S, int Outputs, int Channels, int Columns>
inline void weights_of_channels(const T* x, const T* grad, T* totals, int p, int64_t images) {
    constexpr int left = S::c % Channels;
    constexpr int64_t size = int64_t(S::h) * S::w * lanes<T>, weights = S::kh * S::kw;
    int c = 0;
    for (; c + Channels <= S::c; c += Channels)
        weights_tile<T, S, Outputs, Channels, Columns>(x + c * size, grad, totals + c * weights, p,
                                                       images);
    if constexpr (left)
        weights_tile<T, S, Outputs, left, Columns>(x + c * size, grad, totals + c * weights, p,
                                                   images);
}

template <typename T, class S, int Outputs, int Channels, int Columns>
inline void weights_of_outputs(const T* x, const T* grad, T* totals, int64_t images) {
    constexpr int L = lanes<T>, left = S::kw % Columns;
    for (int p = 0; p < S::kh; ++p, totals += S::kw) {
        int q = 0;
        for (; q + Columns <= S::kw; q += Columns)
            weights_of_channels<T, S, Outputs, Channels, Columns>(x + q * S::dw * L, grad,
                                                                  totals + q, p, images);
        if constexpr (left)
            weights_of_channels<T, S, Outputs, Channels, left>(x + q * S::dw * L, grad, totals + q,
                                                               p, images);
    }
}

template <typename T, class S, int Outputs, int Channels, int Columns>
inline void convolve_weights(const T* x, const T* grad, T* totals, int64_t images) {
    constexpr int L = lanes<T>, left = S::o % Outputs;
    for (int g = 0; g < S::groups; ++g) {
        int o = 0;
        for (; o + Outputs <= S::o; o += Outputs)
            weights_of_outputs<T, S, Outputs, Channels, Columns>(x, grad + o * S::pixels * L,
                                                                 totals + o * S::weights, images);
        if constexpr (left)
            weights_of_outputs<T, S, left, Channels, Columns>(x, grad + o * S::pixels * L,
                                                              totals + o * S::weights, images);
        x += int64_t(S::c) * S::h * S::w * L;
        grad += S::o * S::pixels * L;
        totals += S::o * S::weights;
    }
}

}  // namespace fdl_blocks
#endif
