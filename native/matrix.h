// C (+)= A B for tiles that lie in cache: the only matrix product, of every operation.
#pragma once

#include "vector.h"

namespace SHARDSUM_ISA {

// So many rows and vectors of C fit into the registers beside B's: 32 (AVX-512), or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#endif

// Element (i, k) of A is a[i * a_row + k * a_inner]; B's rows and C's are b_row and c_row apart.
template <typename T> struct Product {
    const T* a;
    int64_t a_row, a_inner;
    const T* b;
    int64_t b_row;
    T* c;
    int64_t c_row;
    int64_t rows, columns, inner;  // columns: a multiple of lanes<T>
    bool add;                      // to C; or else C is overwritten
};

// Numerics: each element of C is one sum over `inner` in order, by FMA where there is one, whatever tile it is in.
template <typename T, int ROWS, int VECTORS> inline void multiply_tile(const Product<T>& p, int64_t row, int64_t column) {
    Vector<T> sum[ROWS][VECTORS];
    const T* a = p.a + row * p.a_row;
    const T* b = p.b + column;
    T* c = p.c + row * p.c_row + column;
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++)
            sum[i][j] = p.add ? load_vector<Vector<T>>(c + i * p.c_row + j * lanes<T>) : Vector<T>{};
    for (int64_t k = 0; k < p.inner; k++) {
        Vector<T> right[VECTORS];
        for (int j = 0; j < VECTORS; j++) right[j] = load_vector<Vector<T>>(b + k * p.b_row + j * lanes<T>);
        for (int i = 0; i < ROWS; i++) {
            Vector<T> left = broadcast(a[i * p.a_row + k * p.a_inner]);
            for (int j = 0; j < VECTORS; j++) sum[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) store_vector(c + i * p.c_row + j * lanes<T>, sum[i][j]);
}

template <typename T, int VECTORS> void multiply_columns(const Product<T>& p, int64_t column) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= p.rows; row += TILE_ROWS) multiply_tile<T, TILE_ROWS, VECTORS>(p, row, column);
    switch (p.rows - row) {
        case 5: return multiply_tile<T, 5, VECTORS>(p, row, column);
        case 4: return multiply_tile<T, 4, VECTORS>(p, row, column);
        case 3: return multiply_tile<T, 3, VECTORS>(p, row, column);
        case 2: return multiply_tile<T, 2, VECTORS>(p, row, column);
        case 1: return multiply_tile<T, 1, VECTORS>(p, row, column);
    }
}

template <typename T> void multiply(const Product<T>& p) {
    int64_t column = 0;
    for (; column + TILE_VECTORS * lanes<T> <= p.columns; column += TILE_VECTORS * lanes<T>)
        multiply_columns<T, TILE_VECTORS>(p, column);
    switch ((p.columns - column) / lanes<T>) {
        case 3: return multiply_columns<T, 3>(p, column);
        case 2: return multiply_columns<T, 2>(p, column);
        case 1: return multiply_columns<T, 1>(p, column);
    }
}

}  // namespace SHARDSUM_ISA
