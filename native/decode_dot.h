// The steps of decode's products of queries and keys, for each type of element.
#pragma once

#include "matrix.h"

namespace SHARDSUM_ISA {

// What a step of a product takes from a row: elements as they are computed with, or pairs where instructions take them.
template <typename E> struct StepOf {
    typedef decltype(element(E{})) Packed, Sum;
    static constexpr int64_t SIZE = lanes<Packed>;
    static auto take(const E* p) { return load(p); }
    static auto take_some(const E* p, int64_t n) { return load_some(p, int(n)); }
};
#if defined(__AVX512BF16__)
template <> struct StepOf<bfloat16> {
    typedef Pair Packed;
    typedef float Sum;
    static constexpr int64_t SIZE = 32;
    static Pairs take(const bfloat16* p) { return load_vector<Pairs>(p); }
    static Pairs take_some(const bfloat16* p, int64_t n) { return (Pairs)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
};
#endif
#if defined(__AVX512VNNI__)
template <> struct StepOf<int8_t> {
    typedef Pair Packed;
    typedef int32_t Sum;  // 512 elements times a query's integers stay below 2^31
    static constexpr int64_t SIZE = 32;
    static Pairs take(const int8_t* p) { return (Pairs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
    static Pairs take_some(const int8_t* p, int64_t n) {
        return (Pairs)_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << n) - 1, p));
    }
};
#endif

// Lane i of the result is the sum of the lanes of v[i], of lanes<T> vectors.
template <typename T, int STEP = lanes<T> / 2> __attribute__((always_inline)) inline Vector<T> sums_of(Vector<T>* v) {
    constexpr auto all = std::make_integer_sequence<int, lanes<T>>();
#pragma GCC unroll 8
    for (int i = 0; i < STEP; i++) v[i] = crossed<STEP, false>(v[i], v[i + STEP], all) + crossed<STEP, true>(v[i], v[i + STEP], all);
    if constexpr (STEP > 1) return sums_of<T, STEP / 2>(v);
    return v[0];
}

// What queries are beside keys and values of type E.
template <typename E> using QueryOf = std::conditional_t<std::is_same_v<E, int8_t>, float, E>;

}  // namespace SHARDSUM_ISA
