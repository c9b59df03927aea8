// Vectors of the instruction set this file is compiled for, by the compiler's vector extension (GCC, Clang).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Everything below is compiled once per instruction set: without a namespace of its own the linker would merge them.
namespace SHARDSUM_ISA {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
// Two neighbours along the inner dimension of a product, as the bfloat16 instructions take them.
struct Pair { uint32_t bits; };
template <typename P> constexpr int64_t ELEMENTS = std::is_same_v<P, Pair> ? 2 : 1;  // in one of P

template <typename T> struct VectorOf { typedef T type __attribute__((vector_size(VECTOR_BYTES))); };
template <typename T> using Vector = typename VectorOf<T>::type;
template <typename T> constexpr int lanes = VECTOR_BYTES / sizeof(T);
template <typename T> using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <typename T> inline Vector<T> broadcast(T x) { return x - Vector<T>{}; }

template <typename V> inline V load_vector(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}
template <typename V> inline void store_vector(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }

// One element, and a vector of elements, in the type that is computed in.
inline float element(float x) { return x; }
inline double element(double x) { return x; }
inline float element(int8_t x) { return float(x); }
inline float element(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float element(float16 x) {
    // The bits of a half, moved to their places in a float, are it times 2^-112; infinities and NaN have all ones above.
    uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    bits |= uint32_t(x.bits & 0x8000) << 16 | ((x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
    std::memcpy(&f, &bits, 4);
    return f;
}

inline Vector<float> load(const float* p) { return load_vector<Vector<float>>(p); }
inline Vector<double> load(const double* p) { return load_vector<Vector<double>>(p); }
inline Vector<float> load(const int8_t* p) {
    // GCC 12 converts bytes one by one.
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (Vector<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    Vector<float> v;
    for (int i = 0; i < lanes<float>; i++) v[i] = element(p[i]);
    return v;
#endif
}
inline Vector<float> load(const bfloat16* p) {
    // GCC 12 widens half a vector at a time.
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));
    Word bits = __builtin_convertvector(load_vector<Half>(p), Word) << 16;
    return (Vector<float>)bits;
#endif
}
inline Vector<float> load(const float16* p) {
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vector<float> v;
    for (int i = 0; i < lanes<float>; i++) v[i] = element(p[i]);
    return v;
#endif
}

// To the nearest bfloat16, the even one of two.
inline bfloat16 rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// Two vectors as one of bfloat16.
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES)));
inline Halves rounded(Vector<float> first, Vector<float> second) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    Halves both;
    for (int i = 0; i < lanes<float>; i++) both[i] = rounded(first[i]).bits, both[lanes<float> + i] = rounded(second[i]).bits;
    return both;
#endif
}

template <int SECOND, int... I> inline Halves alternated(Halves a, Halves b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector(a, b, (SECOND * n / 2 + I / 2 + (I % 2) * n)...);
}
// The elements of the first or SECOND half of a, each before that of b: pairs of both.
template <int SECOND> inline Halves alternated(Halves a, Halves b) {
    return alternated<SECOND>(a, b, std::make_integer_sequence<int, VECTOR_BYTES / 2>());
}

// The first n < lanes elements, zeros behind them.
template <typename E> inline auto load_some(const E* p, int n) {
    E padded[VECTOR_BYTES / sizeof(decltype(element(*p)))] = {};
    std::memcpy(padded, p, n * sizeof(E));
    return load(padded);
}

template <typename T> inline Vector<T> select(Vector<Integer<T>> condition, Vector<T> yes, Vector<T> no) {
    return condition ? yes : no;
}
// b where either is NaN.
template <typename T> inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) return (Vector<T>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
    return a > b ? a : b;
}

template <typename T> inline bool any(Vector<Integer<T>> condition) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#endif
    Integer<T> bits = 0;
    for (int i = 0; i < lanes<T>; i++) bits |= condition[i];
    return bits != 0;
}

template <int STEP, typename V, int... I> inline V exchanged(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ STEP)...);
}
// Lane i of the result is lane i ^ STEP of v.
template <int STEP, typename T> inline Vector<T> exchanged(Vector<T> v) {
    return exchanged<STEP>(v, std::make_integer_sequence<int, lanes<T>>());
}
template <typename T, int STEP = lanes<T> / 2> inline T sum_of(Vector<T> v) {
    v += exchanged<STEP, T>(v);
    if constexpr (STEP > 1) return sum_of<T, STEP / 2>(v);
    return v[0];
}
template <typename T, int STEP = lanes<T> / 2> inline T maximum_of(Vector<T> v) {
    v = maximum<T>(exchanged<STEP, T>(v), v);
    if constexpr (STEP > 1) return maximum_of<T, STEP / 2>(v);
    return v[0];
}

template <int STEP, bool SECOND, typename V, int... I> inline V crossed(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector(a, b, ((I & STEP) ? (SECOND ? n + I : n + I - STEP) : (SECOND ? I + STEP : I))...);
}
// Rows become columns, of lanes<T> vectors: at each step, quarters change places in squares of 2 STEP.
template <typename T, int STEP = lanes<T> / 2> __attribute__((always_inline)) inline void transpose(Vector<T>* rows) {
    constexpr auto all = std::make_integer_sequence<int, lanes<T>>();
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; i++) {
        if (i & STEP) continue;
        Vector<T> a = rows[i], b = rows[i + STEP];
        rows[i] = crossed<STEP, false>(a, b, all);
        rows[i + STEP] = crossed<STEP, true>(a, b, all);
    }
    if constexpr (STEP > 1) transpose<T, STEP / 2>(rows);
}

// A number x = n + f, n whole; 2^f - 1 = f * (c[0] + c[1] f + ...).
template <typename T> struct Split {
    Vector<T> n, f;
};
template <typename T> inline Split<T> split(Vector<T> x) {
    const Vector<T> magic = broadcast(sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0));  // 1.5 * 2^(digits - 1)
    Vector<T> n = x + magic - magic;
    return {n, x - n};
}
// v * 2^n for whole -bias < n < bias.
template <typename T> inline Vector<T> scaled(Vector<T> v, Vector<T> n) {
    const Vector<T> magic = broadcast(sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0));
    typedef Vector<std::make_unsigned_t<Integer<T>>> Bits;  // the sum of signed integers would overflow
    return (Vector<T>)((Bits)v + ((Bits)(n + magic) << (sizeof(T) == 4 ? 23 : 52)));
}

template <typename T> inline Vector<T> polynomial(Vector<T> f, std::initializer_list<T> highest_first) {
    Vector<T> p{};
    for (T c : highest_first) p = p * f + c;
    return p;
}
// 2^f - 1 for |f| <= 1/2, within 2 roundings of itself.
inline Vector<float> power_less_one(Vector<float> f) {
    return f * polynomial<float>(f, {1.535336196e-4f, 1.339887385e-3f, 9.618436918e-3f, 5.550332367e-2f, 2.402264774e-1f,
                                     6.931471825e-1f});
}
inline Vector<double> power_less_one(Vector<double> f) {
    Vector<double> g = f * 0.69314718055994530942;
    return g * polynomial<double>(g, {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                      1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0});
}

// 2^x for x below the type's largest exponent; 0 for those under its smallest normal number; NaN stays.
// Numerics: relative error below 2 roundings. The coefficients are the best in relative error on the interval, by
// linear programming, exact at its ends.
template <typename T> inline Vector<T> exp2_of(Vector<T> x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
        Vector<float> f = (Vector<float>)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
        Vector<float> p = f * 1.879318850e-3f + 8.990994655e-3f;
        p = p * f + 5.581867695e-2f;
        p = p * f + 2.401592731e-1f;
        p = p * f + 6.931517124e-1f;
        return (Vector<float>)_mm512_scalef_ps((__m512)(p * f + 1.0f), (__m512)x);  // times 2^floor(x)
    }
#endif
    const T lowest = sizeof(T) == 4 ? T(-126) : T(-1022);
    Split<T> s = split<T>(x < lowest ? broadcast(lowest) : x);
    Vector<T> p = scaled<T>(power_less_one(s.f) + T(1), s.n);
    return x < lowest ? Vector<T>{} : p;
}
inline Vector<float> exp2(Vector<float> x) { return exp2_of<float>(x); }
inline Vector<double> exp2(Vector<double> x) { return exp2_of<double>(x); }

// Numerics: by 2^x - 1 = 2^n (2^f - 1) + (2^n - 1), so that small x keep their digits.
template <typename T> inline Vector<T> tanh_of(Vector<T> x) {
    Vector<T> y = x * T(2 * 1.4426950408889634074);
    const Vector<T> limit = broadcast(T(60));
    y = y > limit ? limit : y < -limit ? -limit : y;
    Split<T> s = split<T>(y);
    Vector<T> power = scaled<T>(broadcast(T(1)), s.n);
    Vector<T> less_one = power_less_one(s.f) * power + (power - T(1));
    return less_one / (less_one + T(2));
}

constexpr double LOG2_E = 1.4426950408889634074, LN_2 = 0.69314718055994530942;

}  // namespace SHARDSUM_ISA
