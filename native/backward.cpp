// Gradients of attention, the weights computed again from the final lse.
//
// A task is a part of the query rows of one KV head. It takes chunk after chunk of the keys, which lies in L2 with the
// sums of its gradients, and for each, tile after tile of the rows: five products for each block of weights, no more.
// Where there are fewer heads than threads a head's rows are several tasks', whose sums are added in order.
//
// Source: Dao et al. 2022 (FlashAttention, algorithm 4); Dao 2023 (FlashAttention-2, section 3.1).
#include <vector>

#include "operations.h"
#include "backward_block.h"

namespace SHARDSUM_ISA {

constexpr int64_t PARTIAL_BYTES = 256 << 20;  // of sums of d_k and d_v that are still to be added

// How the work is cut: the rows of a KV head into parts, and where there are several, the keys into ranges, so that the
// parts' sums over a range do not fill the memory.
template <typename E> struct Cut {
    typedef Sum<typename PackedOf<E>::type> T;
    int64_t heads, rows, parts, rows_of_a_part, keys;

    explicit Cut(const Backward& a)
        : heads(a.batch * a.kv_heads), rows(a.q_heads / a.kv_heads * a.q_len), parts(1), keys(a.kv_len) {
        const int64_t tiles = (rows + ROWS - 1) / ROWS;
        // Four for each thread end nearly together.
        if (heads < 4 * a.threads && heads % a.threads != 0)
            parts = std::min(tiles, (4 * a.threads + heads - 1) / heads);
        rows_of_a_part = (tiles + parts - 1) / parts * ROWS;
        parts = (rows + rows_of_a_part - 1) / rows_of_a_part;
        if (parts == 1) return;
        const int64_t chunk = Chunk<E>::keys_of_a_chunk(a);
        const int64_t bytes = (parts - 1) * heads * (a.head_dim + a.v_dim) * int64_t(sizeof(T));
        keys = std::min(a.kv_len, std::max(int64_t(1), PARTIAL_BYTES / bytes / chunk) * chunk);
    }
};

// One part of the rows of one KV head, against a range of keys.
template <typename E> class Task {
    typedef Sum<typename PackedOf<E>::type> T;

public:
    Task(const Backward& a, Scratch& scratch, int64_t sequence, int64_t kv_head, int64_t first, int64_t end)
        : a(a), sequence(sequence), kv_head(kv_head), first(first), end(end), chunk(a), tile(a), block(a, chunk, tile) {
        place(Places(scratch.get<char>(place(Places(nullptr)))));
        for (int64_t row = first; row < end; row += ROWS) {
            Span& span = spans[(row - first) / ROWS] = {a.kv_len, 0, 0, a.kv_len};
            for (int64_t r = row; r < std::min(row + ROWS, end); r++)
                span.add(seen(a, sequence, r % a.q_len, 0, a.kv_len));
            if (row + ROWS > end) span.all_end = 0;  // the rows behind the last see nothing
        }
    }

    // The sums go to arrays (key, dim) that begin at the range's first key.
    void run(int64_t first_key, int64_t end_key, T* d_k, T* d_v) {
        for (int64_t key = first_key; key < end_key; key += chunk.most) {
            chunk.pack(sequence, kv_head, key, std::min(chunk.most, end_key - key));
            for (int64_t row = first; row < end; row += ROWS) meet(row, spans[(row - first) / ROWS]);
            chunk.write(d_k + (key - first_key) * a.head_dim, d_v + (key - first_key) * a.v_dim);
        }
    }

private:
    const Backward& a;
    const int64_t sequence, kv_head, first, end;
    Chunk<E> chunk;
    TileOfQueries<E> tile;
    Block<E> block;
    Span* spans;

    int64_t place(Places places) {
        chunk.place(places);
        tile.place(places);
        block.place(places);
        places.take(spans, (end - first + ROWS - 1) / ROWS);
        return places.bytes();
    }

    void meet(int64_t row, const Span& span) {
        if (span.misses(chunk.first, chunk.size)) return;
        tile.pack(sequence, kv_head, row, std::min(ROWS, end - row), chunk.first, chunk.size);
        for (int64_t key = 0; key < chunk.size; key += BLOCK_KEYS) {
            int64_t count = std::min(BLOCK_KEYS, chunk.size - key);
            if (!span.misses(chunk.first + key, count)) block.run(key, count, span);
        }
        tile.write([&](int64_t r) { return static_cast<T*>(a.d_q) + tile.at(r) * a.head_dim; });
    }
};

// Adds the sums of the parts behind the first to its own, in order.
template <typename T>
void add_parts(const T* partial, int64_t parts, int64_t heads, int64_t keys, int64_t dim, T* to, int64_t head_stride) {
#pragma omp for schedule(static)
    for (int64_t head = 0; head < heads; head++)
        for (int64_t part = 1; part < parts; part++) {
            const T* from = partial + ((part - 1) * heads + head) * keys * dim;
            for (int64_t i = 0; i < keys * dim; i++) to[head * head_stride + i] += from[i];
        }
}

template <typename E> void run(const Backward& a) {
    typedef Sum<typename PackedOf<E>::type> T;
    const Cut<E> cut(a);
    std::vector<T> partial((cut.parts - 1) * cut.heads * cut.keys * (a.head_dim + a.v_dim));
    T *partial_k = partial.data(), *partial_v = partial_k + (cut.parts - 1) * cut.heads * cut.keys * a.head_dim;
    // The tensors from a key of a head on, to which the first part writes.
    auto d_k = [&](int64_t head, int64_t key) { return static_cast<T*>(a.d_k) + (head * a.kv_len + key) * a.head_dim; };
    auto d_v = [&](int64_t head, int64_t key) { return static_cast<T*>(a.d_v) + (head * a.kv_len + key) * a.v_dim; };
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Scratch scratch;
        TileRegisters registers;
        for (int64_t key = 0; key < a.kv_len; key += cut.keys) {
            const int64_t keys = std::min(cut.keys, a.kv_len - key);
#pragma omp for schedule(dynamic)
            for (int64_t index = 0; index < cut.parts * cut.heads; index++) {
                // The last rows see most keys under a causal mask: they come first, so that threads end together.
                const int64_t part = cut.parts - 1 - index / cut.heads, head = index % cut.heads;
                const int64_t first = part * cut.rows_of_a_part, other = (part - 1) * cut.heads + head;
                const int64_t end = std::min(first + cut.rows_of_a_part, cut.rows);
                Task<E> task(a, scratch, head / a.kv_heads, head % a.kv_heads, first, end);
                if (part == 0) task.run(key, key + keys, d_k(head, key), d_v(head, key));
                else task.run(key, key + keys, partial_k + other * keys * a.head_dim, partial_v + other * keys * a.v_dim);
            }
            add_parts(partial_k, cut.parts, cut.heads, keys, a.head_dim, d_k(0, key), a.kv_len * a.head_dim);
            add_parts(partial_v, cut.parts, cut.heads, keys, a.v_dim, d_v(0, key), a.kv_len * a.v_dim);
        }
    }
}

void backward(const Backward& a) {
    with_element_of(a.type, [&](auto element) { run<decltype(element)>(a); });
}

}  // namespace SHARDSUM_ISA
