// Merging packed attention states in one pass: each row holds the sum of values, then lse, as in state.py.
#include <cmath>
#include <limits>

#include "operations.h"

namespace SHARDSUM_ISA {

namespace {

// Compiled without fused multiply-adds, which would round one product and not the other: merging is commutative to the
// bit. `into` may be `a` or `b`.
template <typename T>
void merge_rows(const T* a, const T* b, T* into, int64_t rows, int64_t width) {
    const int64_t v_dim = width - 1;
    for (int64_t row = 0; row < rows; ++row, a += width, b += width, into += width) {
        const T lse_a = a[v_dim], lse_b = b[v_dim];
        const T top = lse_a > lse_b ? lse_a : lse_b;
        // Two empty rows: subtract 0, because (-inf) - (-inf) is NaN. NaN stays NaN, whichever of the two has it.
        const T shift = top == -std::numeric_limits<T>::infinity() ? T(0) : top;
        T weight_a = std::exp(lse_a - shift), weight_b = std::exp(lse_b - shift);
        const T total = weight_a + weight_b;
        const T scale = T(1) / (total == T(0) ? T(1) : total);
        weight_a *= scale, weight_b *= scale;
#pragma omp simd
        for (int64_t i = 0; i < v_dim; ++i) into[i] = a[i] * weight_a + b[i] * weight_b;
        into[v_dim] = shift + std::log(total);
    }
}

}  // namespace

void merge(const Merge& m) {
    if (m.type == Type::float64)
        merge_rows(static_cast<const double*>(m.a), static_cast<const double*>(m.b), static_cast<double*>(m.into), m.rows,
                   m.width);
    else
        merge_rows(static_cast<const float*>(m.a), static_cast<const float*>(m.b), static_cast<float*>(m.into), m.rows,
                   m.width);
}

}  // namespace SHARDSUM_ISA
