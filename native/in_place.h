// Products of few rows with keys and values as they lie in memory: what is read only once is not packed.
//
// Numerics: sums have the order of multiply() over panels, and so its bits.
#pragma once

#include "matrix.h"
#include "pack.h"

namespace SHARDSUM_ISA {

// Values are added so many keys at a time: all their columns before the next, so that they lie in L1.
constexpr int64_t KEYS_AT_ONCE = 32;

// Rows of elements in memory, `row` apart; `ahead` elements behind each lies what is asked for meanwhile.
template <typename E> struct RowsInMemory {
    const E* from;
    int64_t row, ahead;

    const E* at(int64_t i, int64_t j) const { return from + i * row + j; }
    void ask_for(int64_t i, int64_t j) const { __builtin_prefetch(at(i, j) + ahead, 0, 2); }
};

// So many elements of a row fill a vector of P.
template <typename P> constexpr int64_t ELEMENTS_AT_ONCE = lanes<Sum<P>> * ELEMENTS<P>;

template <typename P, typename E> inline Vector<Sum<P>> vector_of(const E* p) {
    if constexpr (std::is_same_v<P, Pair>) return load_vector<Vector<float>>(p);
    else return load(p);
}
template <typename P> inline auto right_of(Vector<Sum<P>> v) {
    if constexpr (std::is_same_v<P, Pair>) return (Vector<int32_t>)v;
    else return v;
}

// The products of ROWS rows, a_row apart, and `keys` keys, c_row apart: whole vectors of keys and of elements.
template <int ROWS, typename P, typename E>
void multiply_keys(const P* a, int64_t a_row, RowsInMemory<E> k, int64_t keys, int64_t size, Sum<P>* c, int64_t c_row) {
    typedef Sum<P> T;
    constexpr int n = lanes<T>;
    for (int64_t j = 0; j < keys; j += n) {
        const P* some = a;
        for (int64_t d = 0, end; d < size; d = end) {
            end = std::min(d + ELEMENTS_IN_ORDER, size);
            Vector<T> sum[ROWS], square[n];
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) sum[i] = Vector<T>{};
            for (int64_t e = d; e < end; e += ELEMENTS_AT_ONCE<P>, some += n) {
#pragma GCC unroll 16
                for (int r = 0; r < n; r++) k.ask_for(j + r, e), square[r] = vector_of<P>(k.at(j + r, e));
                transpose<T>(square);
#pragma GCC unroll 16
                for (int r = 0; r < n; r++)
#pragma GCC unroll 6
                    for (int i = 0; i < ROWS; i++) sum[i] = multiply_add(left(some + i * a_row + r), right_of<P>(square[r]), sum[i]);
            }
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++) {
                T* to = c + i * c_row + j;
                store_vector(to, d > 0 ? load(to) + sum[i] : sum[i]);
            }
        }
    }
}

// The same for VECTORS vectors of columns.
template <int ROWS, int VECTORS, typename P, typename E>
void add_columns(const P* a, int64_t a_row, RowsInMemory<E> v, int64_t keys, int64_t column, Sum<P>* c, int64_t c_row) {
    typedef Sum<P> T;
    constexpr int n = lanes<T>;
    Vector<T> sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sum[i][j] = load(c + i * c_row + column + j * n);
    for (int64_t k = 0; k < keys; k += ELEMENTS<P>, a++) {
        for (int64_t e = 0; e < ELEMENTS<P>; e++)
            for (int64_t j = 0; j < VECTORS * n; j += 64 / int64_t(sizeof(E))) v.ask_for(k + e, column + j);
        Vector<T> some[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) {
            if constexpr (!std::is_same_v<P, Pair>) {
                some[j] = load(v.at(k, column + j * n));
            } else if (j % 2 == 0) {
                const Halves one = load_vector<Halves>(v.at(k, column + j * n)), other = load_vector<Halves>(v.at(k + 1, column + j * n));
                some[j] = (Vector<T>)alternated<0>(one, other), some[j + 1] = (Vector<T>)alternated<1>(one, other);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sum[i][j] = multiply_add(left(a + i * a_row), right_of<P>(some[j]), sum[i][j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) store_vector(c + i * c_row + column + j * n, sum[i][j]);
}

// To ROWS rows of sums, c_row apart: their weights, a_row apart, times `keys` values of `size` elements, whole vectors.
template <int ROWS, typename P, typename E>
void add_values_of_rows(const P* a, int64_t a_row, RowsInMemory<E> v, int64_t keys, int64_t size, Sum<P>* c, int64_t c_row) {
    for (int64_t k = 0, some; k < keys; k += some, a += some / ELEMENTS<P>, v.from += some * v.row) {
        some = std::min(KEYS_AT_ONCE, keys - k);
        int64_t column = 0;
        for (; column + PANEL<P> <= size; column += PANEL<P>)
            add_columns<ROWS, TILE_VECTORS>(a, a_row, v, some, column, c, c_row);
        for (; column < size; column += ELEMENTS_AT_ONCE<P>)
            add_columns<ROWS, ELEMENTS<P>>(a, a_row, v, some, column, c, c_row);
    }
}

// Calls `of` with `rows`, from 1 to TILE_ROWS, as a constant.
template <typename Of> void with_rows(int64_t rows, Of of) {
    switch (rows) {
        case 1: return of(std::integral_constant<int, 1>());
        case 2: return of(std::integral_constant<int, 2>());
        case 3: return of(std::integral_constant<int, 3>());
        case 4: return of(std::integral_constant<int, 4>());
        case 5: return of(std::integral_constant<int, 5>());
        case 6: return of(std::integral_constant<int, 6>());
    }
}

}  // namespace SHARDSUM_ISA
