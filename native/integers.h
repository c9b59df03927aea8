// Decode over int8 by products of integers: queries and weights are rounded to 16 bits, sums are exact.
#pragma once

#if defined(__AVX512VNNI__)

#include "matrix.h"
#include "pack.h"

namespace SHARDSUM_ISA {

constexpr int64_t COLUMNS = 64;  // of a vector of int8

// Numbers as integers up to 32767 in size, zeros behind up to `width`; returns what these are to be multiplied by.
// Numerics: within 2^-16 of the largest. A largest one that is not finite is the factor, so that products show it; with
// one below 2^-111 all are 0.
inline float to_integers(const float* from, int64_t size, int16_t* to, int64_t width) {
    constexpr int64_t n = lanes<float>;
    // Without their signs, bits are in the order of the numbers, NaN above all.
    __m512i highest = _mm512_setzero_si512();
    for (int64_t j = 0; j < size; j += n) {
        const __m512 some = _mm512_abs_ps((__m512)load_words<float>(from + j, size - j));
        highest = _mm512_max_epi32(highest, _mm512_castps_si512(some));
    }
    const float factor = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(highest)))) / 32767;
    const float inverse = std::isnormal(factor) ? 1 / factor : 0;
    for (int64_t j = 0; j < size; j += n) {
        const __m512i whole = _mm512_cvtps_epi32((__m512)(load_words<float>(from + j, size - j) * inverse));
        _mm256_storeu_si256((__m256i*)(to + j), _mm512_cvtepi32_epi16(whole));
    }
    for (int64_t j = padded(size, n); j < width; j += n) _mm256_storeu_si256((__m256i*)(to + j), _mm256_setzero_si256());
    return factor;
}

// COLUMNS elements of two rows, as pairs of both: in a vector of pairs i are, from each 16 columns, four of those with
// 8 (i / 2) + i % 2, 2 apart. This order takes no more than two instructions for a vector.
struct TwoRows {
    __m512i pairs[4];

    TwoRows(const int8_t* first, int64_t of_first, const int8_t* second, int64_t of_second) {
        const __m512i a = some(first, of_first), b = some(second, of_second);
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
        pairs[0] = _mm512_srai_epi16(_mm512_slli_epi16(low, 8), 8), pairs[1] = _mm512_srai_epi16(low, 8);
        pairs[2] = _mm512_srai_epi16(_mm512_slli_epi16(high, 8), 8), pairs[3] = _mm512_srai_epi16(high, 8);
    }

private:
    // The first n elements, zeros behind them.
    static __m512i some(const int8_t* p, int64_t n) {
        return _mm512_maskz_loadu_epi8(n >= COLUMNS ? ~uint64_t(0) : (uint64_t(1) << n) - 1, p);
    }
};

// A row's weighted sums of COLUMNS columns.
class ColumnSums {
public:
    void add(const TwoRows& two, const int16_t* two_weights) {
        int32_t both;
        std::memcpy(&both, two_weights, 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sums[i] = multiply_add((Pairs)two.pairs[i], broadcast(both), sums[i]);
    }

    // Adds the sums times `factor` to the columns, of which there are `size`, a multiple of a vector.
    void write(float factor, float* to, int64_t size) const {
        __m512i four[4], some[4];  // columns that follow each other: i times 4 in each 16, then 16 i and more
        for (int i = 0; i < 4; i += 2) {
            four[i] = _mm512_unpacklo_epi32((__m512i)sums[i], (__m512i)sums[i + 1]);
            four[i + 1] = _mm512_unpackhi_epi32((__m512i)sums[i], (__m512i)sums[i + 1]);
        }
        const __m512i a = _mm512_shuffle_i32x4(four[0], four[1], 0x44), b = _mm512_shuffle_i32x4(four[2], four[3], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(four[0], four[1], 0xee), d = _mm512_shuffle_i32x4(four[2], four[3], 0xee);
        some[0] = _mm512_shuffle_i32x4(a, b, 0x88), some[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
        some[2] = _mm512_shuffle_i32x4(c, d, 0x88), some[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
        for (int64_t i = 0; i < 4 && 16 * i < size; i++) {
            const Vector<float> sum = (Vector<float>)_mm512_cvtepi32_ps(some[i]);
            store_vector(to + 16 * i, load(to + 16 * i) + sum * factor);
        }
    }

private:
    Vector<int32_t> sums[4] = {};
};

}  // namespace SHARDSUM_ISA

#endif
