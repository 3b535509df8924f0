// Blocks of images: x[channel][row][column][image], and sums over them.
#ifndef FDL_BLOCKS_LAYERS
#define FDL_BLOCKS_LAYERS

namespace fdl_blocks {

// Exchanges rows and columns of `lanes` vectors: each round puts a number of vector n beside that of
// vector n + lanes / 2, and after log₂ `lanes` rounds those of one column are side by side.
template <typename T, int Half, int... I>
[[gnu::always_inline]] inline Vec<T> interleave(Vec<T> a, Vec<T> b,
                                                std::integer_sequence<int, I...>) {
    return shuffle<T, (I % 2 * lanes<T> + Half * lanes<T> / 2 + I / 2)...>(a, b);
}
template <typename T> inline void transpose(Vec<T>* x) {
    constexpr int L = lanes<T>;
    constexpr auto all = std::make_integer_sequence<int, L>{};
    #pragma GCC unroll 4
    for (int round = 1; round < L; round *= 2) {
        Vec<T> next[L];
        #pragma GCC unroll 8
        for (int n = 0; n < L / 2; ++n) {
            next[2 * n] = interleave<T, 0>(x[n], x[n + L / 2], all);
            next[2 * n + 1] = interleave<T, 1>(x[n], x[n + L / 2], all);
        }
        #pragma GCC unroll 16
        for (int n = 0; n < L; ++n) x[n] = next[n];
    }
}

// From `images` rows of `size` numbers to size × lanes, and back. What is left of a block repeats
// its last image, so that no number comes up that no image has.
template <typename T>
inline void load_block(T* to, const T* x, int64_t size, int64_t images) {
    constexpr int L = lanes<T>;
    const T* rows[L];
    for (int n = 0; n < L; ++n) rows[n] = x + (n < images ? n : images - 1) * size;
    int64_t i = 0;
    for (; i + L <= size; i += L) {
        Vec<T> part[L];
        for (int n = 0; n < L; ++n) part[n] = load(rows[n] + i);
        transpose<T>(part);
        for (int n = 0; n < L; ++n) store(to + (i + n) * L, part[n]);
    }
    for (; i < size; ++i)
        for (int n = 0; n < L; ++n) to[i * L + n] = rows[n][i];
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
    if (size == 1) {  // where the axis of images is the last
        std::memcpy(to, x, sizeof(T) * images);
        return;
    }
    int64_t i = 0;
    for (; i + L <= size; i += L) {
        Vec<T> part[L];
        for (int n = 0; n < L; ++n) part[n] = load(x + (i + n) * L);
        transpose<T>(part);
        for (int n = 0; n < images; ++n) store(to + n * size + i, part[n]);
    }
    for (; i < size; ++i)
        for (int64_t n = 0; n < images; ++n) to[n * size + i] = x[i * L + n];
}

// f(0) + … + f(size − 1), in four sums at a time: each addition waits for the one before.
template <typename T, class F> inline Vec<T> add_all(int64_t size, F f) {
    Vec<T> parts[4] = {};
    int64_t i = 0;
    for (; i + 4 <= size; i += 4)
        for (int k = 0; k < 4; ++k) parts[k] += f(i + k);
    for (; i < size; ++i) parts[0] += f(i);
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Sums of each of `count` rows of `size` numbers over the images: of a bias, say.
template <typename T>
inline void sum_rows(const T* x, int64_t count, int64_t size, T* sums, int64_t images) {
    constexpr int L = lanes<T>;
    for (int64_t c = 0; c < count; ++c, x += size * L)
        sums[c] += sum<T>(add_all<T>(size, [&](int64_t i) { return load(x + i * L); }), images);
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
        const Vec<T> mean = add_all<T>(size, [&](int64_t i) { return load(x + i * L); }) / T(size);
        const Vec<T> squares = add_all<T>(size, [&](int64_t i) {
            const Vec<T> off = load(x + i * L) - mean;
            return off * off;
        });
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
