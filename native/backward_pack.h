// What the backward of attention keeps in cache: a chunk of keys and a tile of query rows, packed for five products.
//
// Weights lie transposed, a key's row over the tile's query rows, so that these rows' bounds, lse, delta are vectors:
//     S^T = k q^T    dP^T = v d_out^T    d_v += P^T d_out    d_k += dS^T q    d_q^T += k^T dS^T
#pragma once

#include "matrix.h"
#include "pack.h"
#include "scores.h"
#include "scratch.h"

namespace SHARDSUM_ISA {

constexpr int64_t ROWS = 64;        // of a tile
constexpr int64_t BLOCK_KEYS = 96;  // of a chunk, that meet a tile at once: whole register tiles, of AMX too
constexpr int64_t CHUNK_BYTES = 640 << 10;  // of a chunk, its gradients included: a part of L2

// Whole register tiles, and whole P in the sum over keys.
template <typename P> constexpr int64_t KEY_STEP = std::max(int64_t(ROW_STEP<P>), INNER_STEP<P> * ELEMENTS<P>);
template <typename P> using Element = std::conditional_t<std::is_same_v<P, Pair>, bfloat16, P>;
template <typename P> using One = std::conditional_t<std::is_same_v<P, Pair>, int, P>;

// How wide rows of head_dim or v_dim elements are: in P along the inner dimension of a product, as a sum, as panels.
template <typename P> struct Widths {
    int64_t inner, sum, panels;

    explicit Widths(int64_t dim)
        : inner(padded((dim + ELEMENTS<P> - 1) / ELEMENTS<P>, INNER_STEP<P>)), sum(padded(dim, lanes<Sum<P>>)),
          panels(padded(dim, PANEL<P>)) {}
};

// `rows` rows of `dim` elements to their columns: to[i * width + r] for rows r.
template <typename P>
void to_columns(const P* from, const Widths<P>& widths, int64_t rows, int64_t dim, P* to, int64_t width) {
    if constexpr (std::is_same_v<P, Pair>)
        pack_columns(reinterpret_cast<const bfloat16*>(from), 2 * widths.inner, rows, dim, widths.inner, to, width);
    else pack_columns(from, widths.inner, rows, dim, to, width);
}

// `rows` rows of elements, along which products sum, to panels of columns.
template <typename P> void to_panels(const P* rows_from, const Widths<P>& widths, int64_t rows, int64_t dim, P* to) {
    const Element<P>* from = reinterpret_cast<const Element<P>*>(rows_from);
    const int64_t stride = widths.inner * ELEMENTS<P>;
    for (int64_t c = 0; c < dim; c += PANEL<P>, to += rows / ELEMENTS<P> * PANEL<P>) {
        int64_t some = std::min(int64_t(PANEL<P>), dim - c);
        if constexpr (std::is_same_v<P, Pair>)
            pack_row_pairs(from + c, stride, rows, some, rows / 2, to, PANEL<P>);
        else pack_rows(from + c, stride, rows, some, P(1), to, PANEL<P>);
    }
}

// Rows of elements transposed: element (i, j) is to[j * width + i] of elements, `width` counted in P.
template <typename P>
void transpose_elements(const P* from, const Widths<P>& widths, int64_t rows, int64_t dim, P* to, int64_t width) {
    if constexpr (std::is_same_v<P, Pair>) {
        constexpr int64_t n = lanes<float>, most = LARGEST_DIM;
        Pair some[n * most];
        for (int64_t i = 0; i < rows; i += 2 * n) {
            const bfloat16* first = reinterpret_cast<const bfloat16*>(from + i * widths.inner);
            pack_row_pairs(first, 2 * widths.inner, std::min(2 * n, rows - i), dim, n, some, dim);
            pack_columns(reinterpret_cast<const float*>(some), dim, n, dim, reinterpret_cast<float*>(to + i / 2), width);
        }
    } else {
        pack_columns(from, widths.inner, rows, dim, to, width);
    }
}

// Keys and values of one KV head, and the sums of their gradients.
template <typename E> struct Chunk {
    typedef typename PackedOf<E>::type P;
    typedef Sum<P> T;
    const Backward& a;
    const Widths<P> head, value;
    const int64_t most;  // keys
    int64_t sequence, kv_head, first, size;
    P *k, *v, *k_transposed;
    T *d_k, *d_v;

    explicit Chunk(const Backward& a) : a(a), head(a.head_dim), value(a.v_dim), most(keys_of_a_chunk(a)) {}

    static int64_t keys_of_a_chunk(const Backward& a) {
        Widths<P> head(a.head_dim), value(a.v_dim);
        int64_t bytes = sizeof(P) * (2 * head.inner + value.inner + head.sum + value.sum);
        return std::max(int64_t(1), CHUNK_BYTES / bytes / BLOCK_KEYS) * BLOCK_KEYS;
    }

    void place(Places& places) {
        places.take(k, most * head.inner);
        places.take(v, most * value.inner);
        places.take(k_transposed, padded(a.head_dim, ROW_STEP<P>) * row_of_transposed());
        places.take(d_k, most * head.sum);
        places.take(d_v, most * value.sum);
    }
    int64_t row_of_transposed() const { return most / ELEMENTS<P>; }

    void pack(int64_t of_sequence, int64_t of_kv_head, int64_t of_first, int64_t of_size) {
        sequence = of_sequence, kv_head = of_kv_head, first = of_first, size = of_size;
        const int64_t all = padded(size, KEY_STEP<P>);
        const E* from = row_of<E>(a.k, sequence, kv_head, first);
        pack_rows(from, a.k.row, size, a.head_dim, One<P>(1), k, head.inner);
        pack_rows(row_of<E>(a.v, sequence, kv_head, first), a.v.row, size, a.v_dim, One<P>(1), v, value.inner);
        std::fill(k + size * head.inner, k + all * head.inner, P{});
        std::fill(v + size * value.inner, v + all * value.inner, P{});
        std::fill(k_transposed, k_transposed + padded(a.head_dim, ROW_STEP<P>) * row_of_transposed(), P{});
        transpose_elements(k, head, size, a.head_dim, k_transposed, row_of_transposed());
        // A key that is not finite makes NaN of its weights, and is nothing to rows that do not see it: 0 * NaN is NaN.
        for (int64_t j = 0; j < size; j++) {
            if (all_finite<T>(from + j * a.k.row, a.head_dim)) continue;
            Element<P>* column = reinterpret_cast<Element<P>*>(k_transposed) + j;
            for (int64_t d = 0; d < a.head_dim; d++) column[d * most] = {};
        }
        clear();
    }

    // Begins the sums again.
    void clear() {
        const int64_t all = padded(size, KEY_STEP<P>);
        std::fill(d_k, d_k + all * head.sum, T(0));
        std::fill(d_v, d_v + all * value.sum, T(0));
    }

    // To arrays (..., key, dim) from the chunk's first key on; -0 becomes 0, which it is where nothing is seen.
    void write(T* to_k, T* to_v) const {
        for (int64_t j = 0; j < size; j++) {
            for (int64_t d = 0; d < a.head_dim; d++) to_k[j * a.head_dim + d] = d_k[j * head.sum + d] * T(a.scale) + T(0);
            for (int64_t d = 0; d < a.v_dim; d++) to_v[j * a.v_dim + d] = d_v[j * value.sum + d] + T(0);
        }
    }
};

// Rows of the query heads of one KV head, one head's behind another's, what flows back into them, and the sum of d_q.
template <typename E> struct TileOfQueries {
    typedef typename PackedOf<E>::type P;
    typedef Sum<P> T;
    const Backward& a;
    const Widths<P> head, value;
    int64_t sequence, kv_head, first, size;
    P *rows, *q_columns, *q_panels, *d_out_columns, *d_out_panels;  // `rows`: on the way to the other forms
    T *lse, *delta, *d_q, *slopes;  // lse in base 2; d_q transposed
    Integer<T> *lo, *hi;            // counted from the chunk's first key
    int64_t* diagonal;
    uint64_t* words;                // of dropout

    explicit TileOfQueries(const Backward& a) : a(a), head(a.head_dim), value(a.v_dim) {}

    void place(Places& places) {
        places.take(rows, ROWS * std::max(head.inner, value.inner));
        places.take(q_columns, ROWS * head.inner);
        places.take(q_panels, ROWS / ELEMENTS<P> * head.panels);
        places.take(d_out_columns, ROWS * value.inner);
        places.take(d_out_panels, ROWS / ELEMENTS<P> * value.panels);
        places.take(d_q, ROWS * rows_of_d_q());
        for (T** piece : {&lse, &delta, &slopes}) places.take(*piece, ROWS);
        for (Integer<T>** piece : {&lo, &hi}) places.take(*piece, ROWS);
        places.take(diagonal, ROWS);
        places.take(words, ROWS);
    }
    int64_t rows_of_d_q() const { return padded(a.head_dim, std::max(int64_t(ROW_STEP<P>), int64_t(lanes<T>))); }
    int64_t q_head(int64_t r) const { return kv_head * (a.q_heads / a.kv_heads) + (first + r) / a.q_len; }
    int64_t position(int64_t r) const { return (first + r) % a.q_len; }
    int64_t at(int64_t r) const { return (sequence * a.q_heads + q_head(r)) * a.q_len + position(r); }

    void pack(int64_t of_sequence, int64_t of_kv_head, int64_t of_first, int64_t of_size, int64_t first_key,
              int64_t keys) {
        sequence = of_sequence, kv_head = of_kv_head, first = of_first, size = of_size;
        for (int64_t r = 0; r < ROWS; r++) describe(r, first_key, keys);
        pack_q();
        pack_d_out();
        std::fill(d_q, d_q + ROWS * rows_of_d_q(), T(0));
    }

    // Adds what the chunk's keys gave to row_at(r), for each row r of the tile.
    template <typename RowAt> void write(RowAt row_at) const {
        constexpr int64_t n = lanes<T>;
        for (int64_t i = 0; i < size; i += n)
            for (int64_t d = 0; d < a.head_dim; d += n) {
                Vector<T> square[n];
                for (int64_t c = 0; c < n; c++) square[c] = load(d_q + (d + c) * ROWS + i) * T(a.scale);
                transpose<T>(square);
                for (int64_t r = 0; r < n && i + r < size; r++) {
                    T* to = row_at(i + r) + d;
                    if (d + n <= a.head_dim) store_vector(to, load(to) + square[r]);
                    else for (int64_t c = 0; d + c < a.head_dim; c++) to[c] += square[r][c];
                }
            }
    }

private:
    // A row's numbers; one behind the last sees nothing.
    void describe(int64_t r, int64_t first_key, int64_t keys) {
        lo[r] = hi[r] = 0, lse[r] = INFINITY, delta[r] = slopes[r] = 0, diagonal[r] = 0, words[r] = 0;
        if (r >= size) return;
        Seen s = seen(a, sequence, position(r), first_key, keys);
        if (s.begin < s.end) lo[r] = s.begin, hi[r] = s.end;
        T of_lse = static_cast<const T*>(a.lse)[at(r)];
        lse[r] = of_lse == -INFINITY ? T(INFINITY) : T(of_lse * LOG2_E);
        delta[r] = static_cast<const T*>(a.delta)[at(r)];
        if (a.alibi_slopes != nullptr) {
            slopes[r] = T(LOG2_E) * T(a.alibi_slopes[q_head(r)]);
            diagonal[r] = a.diagonal[sequence * a.diagonal_batch + position(r)];
        }
        if (a.dropout_p != 0) words[r] = dropout_word(a, sequence, q_head(r), position(r));
    }

    void pack_q() {
        for (int64_t r = 0, some; r < size; r += some) {
            some = std::min(size - r, a.q_len - position(r));
            const E* from = row_of<E>(a.q, sequence, q_head(r), position(r));
            pack_rows(from, a.q.row, some, a.head_dim, One<P>(1), rows + r * head.inner, head.inner);
        }
        std::fill(rows + size * head.inner, rows + ROWS * head.inner, P{});
        to_columns(rows, head, ROWS, a.head_dim, q_columns, ROWS);
        for (int64_t r = 0; r < size; r++) is_finite_or_cleared(r, head.inner);
        to_panels(rows, head, ROWS, a.head_dim, q_panels);
    }

    void pack_d_out() {
        const T* from = static_cast<const T*>(a.d_out);
        pack_rows(from + at(0) * a.v_dim, a.v_dim, size, a.v_dim, One<P>(1), rows, value.inner);
        std::fill(rows + size * value.inner, rows + ROWS * value.inner, P{});
        to_columns(rows, value, ROWS, a.v_dim, d_out_columns, ROWS);
        for (int64_t r = 0; r < size; r++)
            if (!is_finite_or_cleared(r, value.inner)) lse[r] = NAN;  // and so are the weights of the keys that it sees
        to_panels(rows, value, ROWS, a.v_dim, d_out_panels);
    }

    // A row that is not finite is nothing to the keys that it does not see, too.
    bool is_finite_or_cleared(int64_t r, int64_t width) {
        P* row = rows + r * width;
        if (all_finite<T>(reinterpret_cast<const Element<P>*>(row), width * ELEMENTS<P>)) return true;
        std::fill(row, row + width, P{});
        return false;
    }
};

}  // namespace SHARDSUM_ISA
