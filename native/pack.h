// Copies of parts of tensors in the form and type that products want.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "vector.h"

namespace SHARDSUM_ISA {

// What elements are packed as for products: as they are, or wider where no instruction takes them.
template <typename E> struct PackedOf { typedef float type; };
template <> struct PackedOf<double> { typedef double type; };
#if defined(__AVX512BF16__)
template <> struct PackedOf<bfloat16> { typedef Pair type; };
#endif

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename E> inline const E* row_of(const Tensor& t, int64_t sequence, int64_t head, int64_t row) {
    return static_cast<const E*>(t.data) + sequence * t.batch + head * t.head + row * t.row;
}

constexpr int64_t PAGE_BYTES = 4096;

// Asks for a line of each page of `count` rows that follow. A page's address is looked up when it is first asked for,
// and what comes behind waits; so the look-ups of several pages go on at the same time. (Not inlined, GCC 12 would take it
// for a function without effect, and leave out its calls.)
template <typename E> __attribute__((always_inline)) inline void ask_for_pages(const E* rows, int64_t count, int64_t stride) {
    const int64_t of_a_page = std::max(int64_t(1), PAGE_BYTES / std::max(int64_t(1), stride * int64_t(sizeof(E))));
    for (int64_t i = 0; i < count; i += of_a_page) __builtin_prefetch(rows + i * stride, 0, 2);
}

// Runs `operation` with an element of the type, but for int8, which is decode's alone.
template <typename Operation> void with_element_of(Type type, Operation operation) {
    switch (type) {
        case Type::float32: return operation(float());
        case Type::bfloat16: return operation(bfloat16());
        case Type::float16: return operation(float16());
        case Type::float64: return operation(double());
        case Type::int8: return;
    }
}

// `rows` rows of `size` elements, times `factor`; each to[row * width ...], zeros behind.
template <typename E, typename T>
inline void pack_rows(const E* from, int64_t stride, int64_t rows, int64_t size, T factor, T* to, int64_t width) {
    for (int64_t i = 0; i < rows; i++, from += stride, to += width) {
        int64_t j = 0;
        for (; j + lanes<T> <= size; j += lanes<T>) store_vector(to + j, load(from + j) * factor);
        for (; j < size; j++) to[j] = element(from[j]) * factor;
        for (; j < width; j++) to[j] = 0;
    }
}

// Up to a vector of elements from p on, zeros behind the first n.
template <typename T, typename E> inline Vector<T> load_words(const E* p, int64_t n) {
    return n >= lanes<T> ? Vector<T>(load(p)) : Vector<T>(load_some(p, int(n)));
}

// A square of vectors that load(r) gives, r < lanes<T>, transposed to the first `count` rows from `to` on.
template <typename T, typename Load> inline void pack_square(Load load, int64_t count, T* to, int64_t width) {
    constexpr int n = lanes<T>;
    Vector<T> square[n];
#pragma GCC unroll 16
    for (int r = 0; r < n; r++) square[r] = load(r);
    transpose<T>(square);
    if (count < n) {
        for (int64_t c = 0; c < count; c++) store_vector(to + c * width, square[c]);
        return;
    }
#pragma GCC unroll 16
    for (int c = 0; c < n; c++) store_vector(to + c * width, square[c]);
}

// `rows` rows of `size` elements, transposed: element (i, j) is to[j * width + i], zeros behind the last row up to a
// whole vector. `width`: a multiple of a vector. What lies `ahead` elements behind is asked for meanwhile.
template <typename E, typename T>
inline void pack_columns(const E* from, int64_t stride, int64_t rows, int64_t size, T* to, int64_t width, int64_t ahead = 0) {
    constexpr int n = lanes<T>;
    for (int64_t i = 0; i < rows; i += n)
        for (int64_t j = 0; j < size; j += n) {
            const E* some = from + i * stride + j;
            auto whole = [&](int64_t r) {
                __builtin_prefetch(some + r * stride + ahead, 0, 2);
                return Vector<T>(load(some + r * stride));
            };
            auto checked = [&](int64_t r) { return i + r < rows ? load_words<T>(some + r * stride, size - j) : Vector<T>{}; };
            if (i + n <= rows && j + n <= size) pack_square<T>(whole, n, to + j * width + i, width);
            else pack_square<T>(checked, std::min(int64_t(n), size - j), to + j * width + i, width);
        }
}

// The same for pairs along the rows; `pairs` of them, zeros behind the last element.
inline void pack_columns(const bfloat16* from, int64_t stride, int64_t rows, int64_t size, int64_t pairs, Pair* to,
                         int64_t width, int64_t ahead = 0) {
    constexpr int n = lanes<float>;
    for (int64_t i = 0; i < rows; i += n)
        for (int64_t j = 0; j < pairs; j += n) {
            const bfloat16* some = from + i * stride + 2 * j;
            float* into = reinterpret_cast<float*>(to + j * width + i);
            const int64_t left = std::min(size - 2 * j, int64_t(2 * n));
            auto whole = [&](int64_t r) {
                __builtin_prefetch(some + r * stride + ahead, 0, 2);
                return load_vector<Vector<float>>(some + r * stride);
            };
            auto checked = [&](int64_t r) {
                Vector<float> row{};
                if (i + r < rows && left > 0) std::memcpy(&row, some + r * stride, left * 2);
                return row;
            };
            if (i + n <= rows && left == 2 * n) pack_square<float>(whole, n, into, width);
            else pack_square<float>(checked, std::min(int64_t(n), pairs - j), into, width);
        }
}

// Rows 2 i and 2 i + 1 of `rows` as pairs, to[i * width ...]; zeros behind the last row and element, `pairs` such rows.
// What lies `ahead` elements behind is asked for meanwhile.
inline void pack_row_pairs(const bfloat16* from, int64_t stride, int64_t rows, int64_t size, int64_t pairs, Pair* to,
                           int64_t width, int64_t ahead = 0) {
    constexpr int64_t n = VECTOR_BYTES / 2;
    for (int64_t i = 0; i < pairs; i++, to += width) {
        const bfloat16 *first = from + 2 * i * stride, *second = first + stride;
        const int64_t whole = 2 * i < rows ? size : 0, halves = 2 * i + 1 < rows ? size : 0;
        int64_t j = 0;
        for (; j + n <= halves; j += n) {
            __builtin_prefetch(first + j + ahead, 0, 2);
            __builtin_prefetch(second + j + ahead, 0, 2);
            const Halves one = load_vector<Halves>(first + j), other = load_vector<Halves>(second + j);
            store_vector(to + j, alternated<0>(one, other));
            store_vector(to + j + n / 2, alternated<1>(one, other));
        }
        for (; j < halves; j++) to[j].bits = first[j].bits | uint32_t(second[j].bits) << 16;
        for (; j < whole; j++) to[j].bits = first[j].bits;
        for (; j < width; j++) to[j].bits = 0;
    }
}

// Rows times 1 or -1, as pairs; zeros behind, up to `width` pairs.
inline void pack_rows(const bfloat16* from, int64_t stride, int64_t rows, int64_t size, int sign, Pair* to,
                      int64_t width) {
    const uint16_t flip = sign < 0 ? 0x8000 : 0;
    for (int64_t i = 0; i < rows; i++, from += stride, to += width) {
        uint16_t* row = reinterpret_cast<uint16_t*>(to);
        for (int64_t j = 0; j < size; j++) row[j] = from[j].bits ^ flip;
        for (int64_t j = size; j < 2 * width; j++) row[j] = 0;
    }
}

// Rows rounded to bfloat16, as pairs; zeros behind, up to `width` pairs.
inline void pack_rows(const float* from, int64_t stride, int64_t rows, int64_t size, int, Pair* to, int64_t width) {
    for (int64_t i = 0; i < rows; i++, from += stride, to += width) {
        bfloat16* row = reinterpret_cast<bfloat16*>(to);
        for (int64_t j = 0; j < 2 * width; j++) row[j] = rounded(j < size ? from[j] : 0.0f);
    }
}

// Whether all elements that were packed are finite; `count` of P, a multiple of a vector.
template <typename P> inline bool packed_finite(const P* packed, int64_t count) {
    typedef std::conditional_t<std::is_same_v<P, Pair>, int16_t, Integer<P>> Word;
    typedef Word Words __attribute__((vector_size(VECTOR_BYTES)));
    constexpr Word infinity = Word(sizeof(Word) == 2 ? 0x7f80 : sizeof(Word) == 4 ? 0x7f800000 : 0x7ff0000000000000);
    Words largest{};  // bits without sign grow with what they stand for
    for (int64_t i = 0; i < count; i += VECTOR_BYTES / int64_t(sizeof(P))) {
        const Words some = load_vector<Words>(packed + i) & Word(sizeof(Word) == 2 ? 0x7fff : sizeof(Word) == 4 ? 0x7fffffff : 0x7fffffffffffffff);
        largest = largest > some ? largest : some;
    }
    const Vector<int64_t> not_finite = (Vector<int64_t>)(largest >= infinity);
    int64_t some = 0;
    for (int i = 0; i < lanes<int64_t>; i++) some |= not_finite[i];
    return some == 0;
}

// Whether all elements of a row are finite.
template <typename T, typename E> inline bool all_finite(const E* from, int64_t size) {
    Vector<T> zero{};
    for (int64_t j = 0; j < size; j += lanes<T>) zero += load_words<T>(from + j, size - j) * T(0);
    return sum_of<T>(zero) == 0;
}

}  // namespace SHARDSUM_ISA
