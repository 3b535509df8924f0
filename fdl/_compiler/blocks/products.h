// Matrix products of one block of images, and their derivatives.
#ifndef FDL_BLOCKS_PRODUCTS
#define FDL_BLOCKS_PRODUCTS

namespace fdl_blocks {

// The sizes of a product, and how far its rows, columns and terms are apart: in vectors, or in numbers
// of a weight, which all images share.
template <int64_t Groups, int64_t Rows, int64_t Columns, int64_t Terms, int64_t GroupOfA,
          int64_t RowOfA, int64_t TermOfA, int64_t GroupOfB, int64_t TermOfB, int64_t ColumnOfB,
          int64_t GroupTo, int64_t RowTo, int64_t ColumnTo>
struct Product {
    static constexpr int64_t groups = Groups, rows = Rows, columns = Columns, terms = Terms,
                             group_of_a = GroupOfA, row_of_a = RowOfA, term_of_a = TermOfA,
                             group_of_b = GroupOfB, term_of_b = TermOfB, column_of_b = ColumnOfB,
                             group_to = GroupTo, row_to = RowTo, column_to = ColumnTo;
};

// Calls f(rows, columns, first row, first column) for each tile of at most R rows and S columns.
template <int N> using Size = std::integral_constant<int, N>;
template <int Columns, int R, int S, class F> inline void tiles_of_rows(int row, F f) {
    int column = 0;
    for (; column + S <= Columns; column += S) f(Size<R>{}, Size<S>{}, row, column);
    if constexpr (Columns % S) f(Size<R>{}, Size<Columns % S>{}, row, column);
}
template <int Rows, int Columns, int R, int S, class F> inline void each_tile(F f) {
    int row = 0;
    for (; row + R <= Rows; row += R) tiles_of_rows<Columns, R, S>(row, f);
    if constexpr (Rows % R) tiles_of_rows<Columns, Rows % R, S>(row, f);
}

// `R` rows and `S` columns of a product, in registers.
template <typename T, class P, bool Shared, int R, int S>
inline void multiply_tile(const T* a, const T* b, const T* bias, T* to) {
    constexpr int64_t L = lanes<T>;
    Vec<T> sums[S][R];
    #pragma GCC unroll 32
    for (int j = 0; j < S; ++j) {
        const Vec<T> start = bias ? splat(bias[j]) : Vec<T>{};
        #pragma GCC unroll 32
        for (int i = 0; i < R; ++i) sums[j][i] = start;
    }
    for (int64_t k = 0; k < P::terms; ++k) {
        Vec<T> rows[R];
        #pragma GCC unroll 32
        for (int i = 0; i < R; ++i) rows[i] = load(a + (i * P::row_of_a + k * P::term_of_a) * L);
        #pragma GCC unroll 32
        for (int j = 0; j < S; ++j) {
            const int64_t at = k * P::term_of_b + j * P::column_of_b;
            const Vec<T> column = Shared ? broadcast(b + at) : load(b + (Shared ? 0 : at * L));
            #pragma GCC unroll 32
            for (int i = 0; i < R; ++i) sums[j][i] = fma(column, rows[i], sums[j][i]);
        }
    }
    #pragma GCC unroll 32
    for (int j = 0; j < S; ++j)
        #pragma GCC unroll 32
        for (int i = 0; i < R; ++i)
            store(to + (i * P::row_to + j * P::column_to) * L, sums[j][i]);
}

// The product of two activations, or of one and a weight.
template <typename T, class P, bool Shared, int R, int S>
inline void multiply(const T* a, const T* b, const T* bias, T* to) {
    constexpr int64_t L = lanes<T>, of_b = Shared ? 1 : L;
    for (int64_t g = 0; g < P::groups; ++g) {
        each_tile<P::rows, P::columns, R, S>([&](auto rows, auto columns, int row, int column) {
            multiply_tile<T, P, Shared, decltype(rows)::value, decltype(columns)::value>(
                a + row * P::row_of_a * L, b + column * P::column_of_b * of_b,
                bias ? bias + column : bias, to + (row * P::row_to + column * P::column_to) * L);
        });
        a += P::group_of_a * L;
        b += P::group_of_b * of_b;
        to += P::group_to * L;
    }
}

// Numbers that the sums of a tile take: whole vectors.
template <typename T, int N> constexpr int padded = (N + lanes<T> - 1) / lanes<T> * lanes<T>;

template <typename T, int N, int Start = 0>
[[gnu::always_inline]] inline void add_tile(Vec<T>* products, T* totals, int64_t images) {
    constexpr int count = N - Start < lanes<T> ? N - Start : lanes<T>;
    store(totals + Start, load(totals + Start) + sums<T, count>(products + Start, images));
    if constexpr (Start + count < N) add_tile<T, N, Start + count>(products, totals, images);
}

// Calls f(rows, columns, first row, first column) for each tile, one column of tiles after the other;
// `start(columns, first column)` comes before those of a column.
template <int Rows, int R, int S, class F> inline void tiles_of_columns(int column, F f) {
    int row = 0;
    for (; row + R <= Rows; row += R) f(Size<R>{}, Size<S>{}, row, column);
    if constexpr (Rows % R) f(Size<Rows % R>{}, Size<S>{}, row, column);
}
template <int Rows, int Columns, int R, int S, class Start, class F>
inline void each_column(Start start, F f) {
    int column = 0;
    for (; column + S <= Columns; column += S) {
        start(Size<S>{}, column);
        tiles_of_columns<Rows, R, S>(column, f);
    }
    if constexpr (Columns % S) {
        start(Size<Columns % S>{}, column);
        tiles_of_columns<Rows, R, Columns % S>(column, f);
    }
}

// Adds a product whose terms are those of all images to totals, tile by tile. Columns are copied to
// where they lie side by side: rows of a power of two would compete for a few places of the cache.
template <typename T, class P, int R, int S>
inline void add_products(const T* a, const T* b, T* packed, T* totals, int64_t images) {
    constexpr int64_t L = lanes<T>;
    for (int64_t g = 0; g < P::groups; ++g) {
        auto pack = [&](auto columns, int column) {
            constexpr int s = decltype(columns)::value;
            for (int64_t k = 0; k < P::terms; ++k)
                for (int j = 0; j < s; ++j)
                    store(packed + (k * s + j) * L,
                          load(b + ((column + j) * P::column_of_b + k * P::term_of_b) * L));
        };
        auto add = [&](auto rows, auto columns, int row, int) {
            constexpr int r = decltype(rows)::value, s = decltype(columns)::value;
            Vec<T> products[r * s] = {};
            for (int64_t k = 0; k < P::terms; ++k) {
                const T* of_a = a + (row * P::row_of_a + k * P::term_of_a) * L;
                Vec<T> right[s];
                #pragma GCC unroll 32
                for (int j = 0; j < s; ++j) right[j] = load(packed + (k * s + j) * L);
                #pragma GCC unroll 32
                for (int i = 0; i < r; ++i) {
                    const Vec<T> left = load(of_a + i * P::row_of_a * L);
                    #pragma GCC unroll 32
                    for (int j = 0; j < s; ++j)
                        products[i * s + j] = fma(left, right[j], products[i * s + j]);
                }
            }
            add_tile<T, r * s>(products, totals, images);
            totals += padded<T, r * s>;
        };
        each_column<P::rows, P::columns, R, S>(pack, add);
        a += P::group_of_a * L;
        b += P::group_of_b * L;
    }
}

// The totals of all threads, in their order, as a contiguous matrix.
template <typename T, class P, int R, int S>
inline void add_up_products(const T* totals, int64_t stride, int threads, T* to) {
    auto nothing = [](auto, int) {};
    for (int64_t g = 0; g < P::groups; ++g, to += P::rows * P::columns)
        each_column<P::rows, P::columns, R, S>(nothing, [&](auto rows, auto columns, int row,
                                                            int column) {
            constexpr int r = decltype(rows)::value, s = decltype(columns)::value;
            for (int i = 0; i < r; ++i)
                for (int j = 0; j < s; ++j) {
                    T sum = totals[i * s + j];
                    for (int t = 1; t < threads; ++t) sum += totals[t * stride + i * s + j];
                    to[(row + i) * P::columns + column + j] = sum;
                }
            totals += padded<T, r * s>;
        });
}

}  // namespace fdl_blocks
#endif
