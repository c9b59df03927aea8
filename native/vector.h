// Vectors of the instruction set this file is compiled for, by the compiler's vector extension (GCC, Clang).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

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
inline Vector<float> load(const bfloat16* p) {
    typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));
    Word bits = __builtin_convertvector(load_vector<Half>(p), Word) << 16;
    return (Vector<float>)bits;
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

// The first n < lanes elements, zeros behind them.
template <typename E> inline auto load_some(const E* p, int n) {
    E padded[VECTOR_BYTES / sizeof(decltype(element(*p)))] = {};
    std::memcpy(padded, p, n * sizeof(E));
    return load(padded);
}

template <typename T> inline Vector<T> select(Vector<Integer<T>> condition, Vector<T> yes, Vector<T> no) {
    return condition ? yes : no;
}
// NaN in either stays.
template <typename T> inline Vector<T> maximum(Vector<T> a, Vector<T> b) { return (a > b) | (a != a) ? a : b; }

template <typename T> inline T sum_of(Vector<T> v) {
    T total = v[0];
    for (int i = 1; i < lanes<T>; i++) total += v[i];
    return total;
}
template <typename T> inline T maximum_of(Vector<T> v) {
    T top = v[0];
    for (int i = 1; i < lanes<T>; i++) top = v[i] > top || v[i] != v[i] ? v[i] : top;
    return top;
}

// 2^x for x <= 0 and a little above: relative error below 2 roundings; 0 below the smallest normal number; NaN stays.
// Numerics: x = n + f with |f| <= 1/2; the Taylor series of e^(f ln 2), cut where its rest is below a rounding.
inline Vector<float> exp2(Vector<float> x) {
    typedef Vector<int32_t> Ints;
    const Vector<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vector<float> clamped = x < -126.0f ? broadcast(-126.0f) : x;
    Vector<float> shifted = clamped + magic;
    Vector<float> f = clamped - (shifted - magic);
    Vector<float> p = broadcast(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    Vector<float> scaled = (Vector<float>)((Ints)p + ((Ints)shifted << 23));
    return x < -126.0f ? Vector<float>{} : scaled;
}
inline Vector<double> exp2(Vector<double> x) {
    typedef Vector<int64_t> Ints;
    const Vector<double> magic = broadcast(6755399441055744.0);
    Vector<double> clamped = x < -1022.0 ? broadcast(-1022.0) : x;
    Vector<double> shifted = clamped + magic;
    Vector<double> g = (clamped - (shifted - magic)) * 0.69314718055994530942;
    Vector<double> p = broadcast(1.0 / 6227020800.0);
    for (double factorial : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0})
        p = p * g + 1.0 / factorial;
    Vector<double> scaled = (Vector<double>)((Ints)p + ((Ints)shifted << 52));
    return x < -1022.0 ? Vector<double>{} : scaled;
}

constexpr double LOG2_E = 1.4426950408889634074, LN_2 = 0.69314718055994530942;

}  // namespace SHARDSUM_ISA
