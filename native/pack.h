// Copies of parts of tensors in the form and type that products want.
#pragma once

#include "arguments.h"
#include "vector.h"

namespace SHARDSUM_ISA {

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename E> inline const E* row_of(const Tensor& t, int64_t sequence, int64_t head, int64_t row) {
    return static_cast<const E*>(t.data) + sequence * t.batch + head * t.head + row * t.row;
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

// `rows` rows of `size` elements, transposed: element (i, j) is to[j * width + i], zeros behind the last row.
template <typename E, typename T>
inline void pack_columns(const E* from, int64_t stride, int64_t rows, int64_t size, T* to, int64_t width) {
    for (int64_t j = 0; j < size; j++) {
        for (int64_t i = 0; i < rows; i++) to[j * width + i] = element(from[i * stride + j]);
        for (int64_t i = rows; i < width; i++) to[j * width + i] = 0;
    }
}

// Whether all elements of these rows are finite.
template <typename T> inline bool all_finite(const T* from, int64_t stride, int64_t rows, int64_t size) {
    Vector<T> zero{};
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < size; j += lanes<T>) zero += load(from + i * stride + j) * T(0);
    return sum_of<T>(zero) == 0;
}

}  // namespace SHARDSUM_ISA
