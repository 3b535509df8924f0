// Blocks of images: x[channel][row][column][image], and sums over them.
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

// Sums of each of `count` rows of `size` numbers over the images: of a bias, say.
template <typename T>
inline void sum_rows(const T* x, int64_t count, int64_t size, T* sums, int64_t images) {
    constexpr int L = lanes<T>;
    for (int64_t c = 0; c < count; ++c) {
        Vec<T> parts[4] = {};
        int64_t i = 0;
        for (; i + 4 <= size; i += 4, x += 4 * L)
            for (int k = 0; k < 4; ++k) parts[k] += load(x + k * L);
        for (; i < size; ++i, x += L) parts[0] += load(x);
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
