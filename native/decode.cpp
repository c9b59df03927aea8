// Attention of few rows: memory is read once, as fast as it can be, by all threads.
//
// The keys that a KV head's rows see are cut into chunks at fixed positions. A chunk's keys and values are read once for
// all rows (all query heads of the group, all query positions), block after block, the softmax taken online. That gives
// a state for each row and chunk; in the end they are merged, from the first chunk to the last. So a row has the same
// bits on any number of threads, in any batch, and whatever keys lie behind its own.
//
// Source: Dao, Haziza, Massa, Sizov 2023 (Flash-Decoding); Dao et al. 2022 (FlashAttention, algorithm 1).
#include <vector>

#include "operations.h"
#include "decode_chunk.h"
#include "scratch.h"

namespace SHARDSUM_ISA {

// A state is written for each, of 1/256 of the bytes read (4 rows in float32 for 512 keys in bfloat16).
constexpr int64_t CHUNK = 512;

// The chunks of all sequences and KV heads, numbered: those of a KV head from `first` of it on.
class Chunks {
public:
    explicit Chunks(const Forward& a) : a(a), first(a.batch * a.kv_heads + 1), begin(a.batch) {
        for (int64_t b = 0; b < a.batch; b++) {
            int64_t end = 0;
            begin[b] = a.kv_len;
            for (int64_t i = 0; i < a.q_len; i++) {
                Seen s = seen(a, b, i, 0, a.kv_len);
                if (s.begin < s.end) begin[b] = std::min(begin[b], s.begin), end = std::max(end, s.end);
            }
            int64_t count = begin[b] < end ? (end - 1) / CHUNK - begin[b] / CHUNK + 1 : 0;
            for (int64_t h = b * a.kv_heads; h < (b + 1) * a.kv_heads; h++) first[h + 1] = first[h] + count;
        }
    }

    int64_t count() const { return first.back(); }
    Seen of(int64_t head) const { return {first[head], first[head + 1]}; }
    int64_t head_of(int64_t chunk) const { return std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1; }
    int64_t key_of(int64_t chunk, int64_t head) const {
        return (begin[head / a.kv_heads] / CHUNK + chunk - first[head]) * CHUNK;
    }

private:
    const Forward& a;
    std::vector<int64_t> first, begin;
};

// One row's states over `count` chunks, merged in their order, to out and lse.
template <typename T> void merge(const Forward& a, const States<T>& states, int64_t row, Seen chunks, int64_t at) {
    T top = -INFINITY, total = 0, *out = static_cast<T*>(a.out) + at * a.v_dim;
    for (int64_t c = chunks.begin; c < chunks.end; c++) top = std::max(top, states.top(c, row));
    alignas(64) T sum[LARGEST_DIM] = {};
    for (int64_t c = chunks.begin; c < chunks.end; c++) {
        T weight = states.top(c, row) == -INFINITY ? T(0) : exp2(broadcast(states.top(c, row) - top))[0];
        total += states.total(c, row) * weight;
        const T* from = states.sum(c, row);
        for (int64_t j = 0; j < states.width; j += lanes<T>) store_vector(sum + j, load(from + j) * weight + load(sum + j));
    }
    for (int64_t j = 0; j < a.v_dim; j++) out[j] = total == 0 ? T(0) : sum[j] / total;
    static_cast<T*>(a.lse)[at] = total == 0 ? -INFINITY : T((top + std::log2(double(total))) * LN_2);
}

template <typename E> void run_decode(const Forward& a) {
    typedef decltype(element(E{})) T;
    const Chunks chunks(a);
    const int64_t group = a.q_heads / a.kv_heads, rows = group * a.q_len;
    static thread_local Scratch of_states;
    const States<T> states(a, rows, chunks.count(), of_states);
    // Runs of chunks that follow each other: one thread reads on where it is. Sixteen for each thread end together.
    const int64_t run = std::max(int64_t(1), chunks.count() / (16 * a.threads)), runs = (chunks.count() + run - 1) / run;
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < runs; i++)
            for (int64_t c = i * run; c < std::min((i + 1) * run, chunks.count()); c++) {
                int64_t head = chunks.head_of(c), key = chunks.key_of(c, head);
                RowsOfChunk<E>(a, head / a.kv_heads, head % a.kv_heads, scratch).attend(key, key + CHUNK, states, c);
            }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.batch * a.kv_heads * rows; i++)
            merge(a, states, i % rows, chunks.of(i / rows), i);
    }
}

void decode(const Forward& a) {
    if (a.type == Type::int8) return run_decode<int8_t>(a);
    with_element_of(a.type, [&](auto element) { run_decode<decltype(element)>(a); });
}

}  // namespace SHARDSUM_ISA
