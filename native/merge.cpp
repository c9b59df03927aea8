// Making and merging attention states: each row holds the sum of values, then lse, as in state.py.
//
// Numerics: merging is commutative to the bit, (0, -inf) leaves the other side's bits alone, and a NaN has one pattern
// whatever it came from. The logarithm and the exponential are exact where they must be: of 1, and of 0.
#include <algorithm>
#include <limits>

#include "operations.h"
#include "row_sums.h"
#include "vector.h"

namespace SHARDSUM_ISA {

namespace {

constexpr double NAN_OF_ALL = std::numeric_limits<double>::quiet_NaN();

template <typename T> Vector<T> without_patterns(Vector<T> x) { return x == x ? x : broadcast(T(NAN_OF_ALL)); }

// The sum of c[0] + c[1] x + c[2] x^2 ...
template <typename T, int COUNT> Vector<T> power_series(Vector<T> x, const double (&c)[COUNT]) {
    Vector<T> sum = broadcast(T(c[COUNT - 1]));
    for (int i = COUNT - 2; i >= 0; i--) sum = sum * x + T(c[i]);
    return sum;
}

// e^x for x <= 0; 0 where that is below the smallest normal number.
// Numerics: within 2^-24 (2^-53) of it times 2, which is what matters beside the 1 of the larger side.
template <typename T> Vector<T> exponential(Vector<T> x) {
    constexpr double of_float[] = {1, 1, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040};
    constexpr double of_double[] = {1, 1, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880,
                                    1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
    const Vector<T> lowest = broadcast(sizeof(T) == 4 ? T(-87) : T(-708));
    const Split<T> s = split<T>((x < lowest ? lowest : x) * T(LOG2_E));
    Vector<T> power;
    if constexpr (sizeof(T) == 4) power = power_series<T>(s.f * T(LN_2), of_float);
    else power = power_series<T>(s.f * T(LN_2), of_double);
    power = scaled<T>(power, s.n);
    return x < lowest ? Vector<T>{} : x == x ? power : x;
}

// The natural logarithm of a positive normal number, by that of (1 + s) / (1 - s) = 2 (s + s^3 / 3 + ...).
template <typename T> Vector<T> logarithm(Vector<T> x) {
    constexpr double of_float[] = {2, 2. / 3, 2. / 5, 2. / 7, 2. / 9, 2. / 11};
    constexpr double of_double[] = {2, 2. / 3, 2. / 5, 2. / 7, 2. / 9, 2. / 11, 2. / 13, 2. / 15, 2. / 17, 2. / 19, 2. / 21};
    typedef Vector<Integer<T>> Ints;
    constexpr int digits = sizeof(T) == 4 ? 23 : 52;
    // x = 2^n m, and m lies between the roots of 1/2 and of 2.
    const Ints n = ((Ints)x - (Ints)broadcast(T(0.70710678118654752))) >> digits;
    const Vector<T> m = (Vector<T>)((Ints)x - (n << digits)), s = (m - T(1)) / (m + T(1)), square = s * s;
    Vector<T> of_m;
    if constexpr (sizeof(T) == 4) of_m = s * power_series<T>(square, of_float);
    else of_m = s * power_series<T>(square, of_double);
    const Vector<T> found = __builtin_convertvector(n, Vector<T>) * T(LN_2) + of_m;
    return x == x ? found : x;
}

// What the rows of two states are multiplied by, and the lse of their sum.
template <typename T> struct Shares { Vector<T> a, b, lse; };

template <typename T> Shares<T> shares_of(Vector<T> lse_a, Vector<T> lse_b) {
    const Vector<T> top = lse_a > lse_b ? lse_a : lse_b;
    const Vector<T> a = exponential<T>(lse_a - top), b = exponential<T>(lse_b - top), total = a + b;
    return {a / total, b / total, without_patterns<T>(top + logarithm<T>(total))};
}

// Returns the lse.
template <typename T> T merge_row(const T* a, const T* b, T* out, int64_t v_dim, T share_a, T share_b, T lse) {
    constexpr T empty = -std::numeric_limits<T>::infinity();
    if (a[v_dim] == empty || b[v_dim] == empty) {
        const T *none = a[v_dim] == empty ? a : b, *other = a[v_dim] == empty ? b : a;
        lse = other[v_dim];
        for (int64_t i = 0; i < v_dim; ++i) out[i] = none[i] == none[i] ? other[i] : none[i];
        return lse;
    }
#pragma omp simd
    for (int64_t i = 0; i < v_dim; ++i) {
        const T sum = a[i] * share_a + b[i] * share_b;
        out[i] = sum == sum ? sum : T(NAN_OF_ALL);
    }
    return lse;
}

// Without a row, the other operand's: nothing is done to it.
template <typename T> Vector<T> every(const T* from, int64_t row, int64_t rows) {
    Vector<T> found{};
    for (int64_t i = 0; i < rows; ++i) found[i] = from[i * row];
    return found;
}

template <typename T> void merge_rows(const Merge& m) {
    constexpr int64_t n = lanes<T>;
    const int64_t v_dim = m.width - 1;
    for (int64_t first = 0; first < m.rows; first += n) {
        const int64_t some = std::min(n, m.rows - first);
        const T *a = static_cast<const T*>(m.a) + first * m.row, *b = static_cast<const T*>(m.b) + first * m.row;
        T *out = static_cast<T*>(m.out) + first * m.out_row, *lse = static_cast<T*>(m.lse) + first * m.lse_row;
        const Shares<T> shares = shares_of<T>(every(a + v_dim, m.row, some), every(b + v_dim, m.row, some));
        for (int64_t i = 0; i < some; ++i)
            lse[i * m.lse_row] =
                merge_row(a + i * m.row, b + i * m.row, out + i * m.out_row, v_dim, shares.a[i], shares.b[i], shares.lse[i]);
    }
}

template <typename T> void close_some(const Sums<T>& sums, int64_t first, int64_t rows, int64_t v_dim, T* states, int64_t row) {
    constexpr int64_t n = lanes<T>;
    Vector<T> total{}, top{};
    for (int64_t i = 0; i < rows; ++i) {
        T* weights = sums.weights + (first + i) * n;
        total[i] = sum_of<T>(load(weights)), top[i] = sums.top[first + i];
        store_vector(weights, Vector<T>{});
        sums.top[first + i] = -std::numeric_limits<T>::infinity();
    }
    const Vector<T> lse = without_patterns<T>(top * T(LN_2) + logarithm<T>(total)), factor = T(1) / total;
    for (int64_t i = 0; i < rows; ++i) {
        T *values = sums.values + (first + i) * sums.width, *state = states + (first + i) * row;
        for (int64_t j = 0; j < sums.width; j += n) {
            // Added 0 makes -0 a 0, which it would have become, or not, with one more key that the row does not see.
            store_vector(state + j, without_patterns<T>(load(values + j) * factor[i] + T(0)));
            store_vector(values + j, Vector<T>{});
        }
        state[v_dim] = lse[i];
        if (total[i] == T(0)) clear_states(state, 1, v_dim, row);  // also where a value is not finite
    }
}

}  // namespace

template <typename T> void close(const Sums<T>& sums, int64_t rows, int64_t v_dim, T* states, int64_t row) {
    constexpr int64_t n = lanes<T>;
    for (int64_t first = 0; first < rows; first += n) close_some(sums, first, std::min(n, rows - first), v_dim, states, row);
}
template void close(const Sums<float>&, int64_t, int64_t, float*, int64_t);
template void close(const Sums<double>&, int64_t, int64_t, double*, int64_t);

template <typename T> void clear_states(T* states, int64_t rows, int64_t v_dim, int64_t row) {
    for (int64_t i = 0; i < rows; ++i, states += row) {
        std::fill(states, states + v_dim, T(0));
        states[v_dim] = -std::numeric_limits<T>::infinity();
    }
}
template void clear_states(float*, int64_t, int64_t, int64_t);
template void clear_states(double*, int64_t, int64_t, int64_t);

void merge(const Merge& m) {
    if (m.type == Type::float64) merge_rows<double>(m);
    else merge_rows<float>(m);
}

}  // namespace SHARDSUM_ISA
