// The machine's limits: how fast memory can be read, and how many multiplications and additions fit into a second.
#include "operations.h"
#include "pack.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace SHARDSUM_ISA {

// The sum of `count` floats, so that each is read. Source: McCalpin 1995 (STREAM), without the writes.
double read_memory(const float* data, int64_t count, int threads) {
    constexpr int64_t UNROLLED = 8, AHEAD = 4096 / sizeof(float), PIECE = 16384 / sizeof(float);
    const int64_t vectors = count / lanes<float> / UNROLLED;
    double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        Vector<float> sums[UNROLLED] = {};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < vectors; i++) {
            const float* some = data + i * UNROLLED * lanes<float>;
            if (i * UNROLLED * lanes<float> % PIECE == 0) ask_for_pages(some + AHEAD + PIECE, PIECE, 1);
            for (int64_t j = 0; j < UNROLLED; j++) {
                const float* p = some + j * lanes<float>;
                __builtin_prefetch(p + AHEAD, 0, 2);
                sums[j] += load(p);
            }
        }
        for (const Vector<float>& sum : sums) total += sum_of<float>(sum);
    }
    return total;
}

namespace {

// Independent sums that hide an instruction's latency and stay in registers.
constexpr int SUMS = 12;

// Each returns something that depends on all it computed, so that it is computed.
double multiply_floats(int64_t rounds) {
    Vector<float> sums[SUMS], factor = broadcast(0.5f), added = broadcast(1e-9f);
    for (int j = 0; j < SUMS; j++) sums[j] = broadcast(float(j));
    for (int64_t i = 0; i < rounds; i++)
        for (Vector<float>& sum : sums) sum = sum * factor + added;
    float total = 0;
    for (const Vector<float>& sum : sums) total += sum_of<float>(sum);
    return total;
}

#if defined(__AMX_BF16__)

double multiply_bfloat16s(int64_t rounds) {
    alignas(64) struct {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    alignas(64) float held[256] = {};
    _tile_loadconfig(&shape);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, held, 64);
    _tile_loadd(5, held, 64);
    _tile_loadd(6, held, 64);
    _tile_loadd(7, held, 64);
    for (int64_t i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    double total = 0;
    _tile_stored(0, held, 64);
    total += held[0];
    _tile_stored(1, held, 64);
    total += held[0];
    _tile_stored(2, held, 64);
    total += held[0];
    _tile_stored(3, held, 64);
    total += held[0];
    _tile_release();
    return total;
}
constexpr double FLOPS_OF_BFLOAT16S = 4 * 16 * 16 * 32 * 2;

#elif defined(__AVX512BF16__)

double multiply_bfloat16s(int64_t rounds) {
    __m512 sums[SUMS];
    for (int j = 0; j < SUMS; j++) sums[j] = _mm512_set1_ps(float(j));
    __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f00), y = (__m512bh)_mm512_set1_epi16(0x3a00);
    for (int64_t i = 0; i < rounds; i++)
        for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, x, y);
    double total = 0;
    for (const __m512& sum : sums) total += _mm512_reduce_add_ps(sum);
    return total;
}
constexpr double FLOPS_OF_BFLOAT16S = SUMS * 32 * 2;

#else

double multiply_bfloat16s(int64_t rounds) { return multiply_floats(rounds); }
constexpr double FLOPS_OF_BFLOAT16S = SUMS * lanes<float> * 2;

#endif

}  // namespace

// The operations that `rounds` rounds on each thread are: of float32, or of products of bfloat16 added in float32.
double multiply_add(bool of_bfloat16, int64_t rounds, int threads) {
    double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    total += of_bfloat16 ? multiply_bfloat16s(rounds) : multiply_floats(rounds);
    double flops = of_bfloat16 ? FLOPS_OF_BFLOAT16S : SUMS * lanes<float> * 2;
    return total < 0 ? 0 : flops * double(rounds) * threads;
}

}  // namespace SHARDSUM_ISA
