// C (+)= A B for tiles that lie in cache: the only matrix product, of every operation.
#pragma once

#include <algorithm>

#include "vector.h"

namespace SHARDSUM_ISA {

// So many rows and vectors of C fit into the registers beside B's: 32 (AVX-512), or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#endif

// So many columns are a panel: what one tile reads of B lies together.
template <typename T> constexpr int PANEL = TILE_VECTORS * VECTOR_BYTES / sizeof(T);
// A score sums so many elements in order, and then these sums: in longer ones roundings add up. AMX sums all in order.
constexpr int64_t ELEMENTS_IN_ORDER = 128;
template <typename T> using Sum = std::conditional_t<std::is_same_v<T, Pair>, float, T>;

#if defined(__AMX_BF16__)
template <typename T> constexpr int INNER_STEP = std::is_same_v<T, Pair> ? 16 : 1;
template <typename T> constexpr int ROW_STEP = std::is_same_v<T, Pair> ? 32 : 1;
#else
template <typename T> constexpr int INNER_STEP = 1;
template <typename T> constexpr int ROW_STEP = 1;
#endif

// Element (i, k) of A is a[i * a_row + k * a_inner]; B's rows and C's are b_row and c_row apart.
template <typename T> struct Product {
    const T* a;
    int64_t a_row, a_inner;
    const T* b;
    int64_t b_row;
    Sum<T>* c;
    int64_t c_row;
    int64_t rows, columns, inner;  // multiples of ROW_STEP<T>, of a vector, of INNER_STEP<T>
    bool add;                      // to C; or else C is overwritten
};

template <typename T> inline Vector<T> left(const T* p) { return broadcast(*p); }
template <typename T> inline Vector<T> right(const T* p) { return load(p); }
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> sum) { return a * b + sum; }
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> sum) { return a * b + sum; }
#if defined(__AVX512BF16__)
typedef Vector<int32_t> Pairs;
inline Pairs left(const Pair* p) { return broadcast(int32_t(p->bits)); }
inline Pairs right(const Pair* p) { return load_vector<Pairs>(p); }
inline Vector<float> multiply_add(Pairs a, Pairs b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif
#if defined(__AVX512VNNI__)
// Of pairs of 16-bit integers.
inline Vector<int32_t> multiply_add(Pairs a, Pairs b, Vector<int32_t> sum) {
    return (Vector<int32_t>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#endif

// Numerics: what an element of C receives is one sum over `inner` in order, by FMA where there is one, whatever tile it is
// in; it is added to what was there at the end, so that roundings are of the small sum's size.
template <typename T, int ROWS, int VECTORS> inline void multiply_tile(const Product<T>& p, int64_t row, int64_t column) {
    typedef Sum<T> C;
    Vector<C> sum[ROWS][VECTORS];
    const T* a = p.a + row * p.a_row;
    const T* b = p.b + column;
    C* c = p.c + row * p.c_row + column;
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sum[i][j] = Vector<C>{};
    for (int64_t k = 0; k < p.inner; k++, a += p.a_inner, b += p.b_row)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++)
                sum[i][j] = multiply_add(left(a + i * p.a_row), right(b + j * lanes<C>), sum[i][j]);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) {
            C* to = c + i * p.c_row + j * lanes<C>;
            store_vector(to, p.add ? load(to) + sum[i][j] : sum[i][j]);
        }
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
    for (; column + PANEL<T> <= p.columns; column += PANEL<T>) multiply_columns<T, TILE_VECTORS>(p, column);
    switch ((p.columns - column) / lanes<Sum<T>>) {
        case 3: return multiply_columns<T, 3>(p, column);
        case 2: return multiply_columns<T, 2>(p, column);
        case 1: return multiply_columns<T, 1>(p, column);
    }
}

#if defined(__AMX_BF16__)
// The thread's tile registers, eight of 16 rows of 64 bytes: 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 of B.
class TileRegisters {
public:
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    TileRegisters(const TileRegisters&) = delete;
    ~TileRegisters() { _tile_release(); }
};

// 32 rows, and 16 columns, or 32 if TWO.
template <bool TWO> inline void multiply_tiles(const Product<Pair>& p, int64_t row, int64_t column) {
    const Pair* a = p.a + row * p.a_row;
    const Pair* b = p.b + column;
    float* c = p.c + row * p.c_row + column;
    const int64_t a_bytes = p.a_row * 4, b_bytes = p.b_row * 4, c_bytes = p.c_row * 4;
    if (p.add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + 16 * p.c_row, c_bytes);
        if (TWO) _tile_loadd(2, c + 16, c_bytes);
        if (TWO) _tile_loadd(3, c + 16 * p.c_row + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) _tile_zero(2);
        if (TWO) _tile_zero(3);
    }
    for (int64_t k = 0; k < p.inner; k += 16, a += 16, b += 16 * p.b_row) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + 16 * p.a_row, a_bytes);
        _tile_dpbf16ps(1, 5, 6);
        if (!TWO) continue;
        _tile_loadd(7, b + 16, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16 * p.c_row, c_bytes);
    if (TWO) _tile_stored(2, c + 16, c_bytes);
    if (TWO) _tile_stored(3, c + 16 * p.c_row + 16, c_bytes);
}

// a_inner is 1.
template <> inline void multiply<Pair>(const Product<Pair>& p) {
    int64_t column = 0;
    for (; column + 32 <= p.columns; column += 32)
        for (int64_t row = 0; row < p.rows; row += 32) multiply_tiles<true>(p, row, column);
    for (int64_t row = 0; row < p.rows && column < p.columns; row += 32) multiply_tiles<false>(p, row, column);
}
#else
struct TileRegisters {
    TileRegisters() {}  // not trivial: no warning of an unused variable
};
#endif

// C = A B for scores and what else sums over head_dim or v_dim, in the order that they have everywhere.
template <typename T> void multiply_scores(Product<T> p) {
    const int64_t all = p.inner, step = INNER_STEP<T> > 1 ? all : ELEMENTS_IN_ORDER / ELEMENTS<T>;
    for (int64_t done = 0; done < all; done += step, p.a += step * p.a_inner, p.b += step * p.b_row) {
        p.inner = std::min(step, all - done), p.add = done > 0;
        multiply<T>(p);
    }
}

}  // namespace SHARDSUM_ISA
