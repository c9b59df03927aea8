// Gradients along fixed trees: d_q over the segments of keys, d_k and d_v over those of rows.
//
// A segment of rows and one of keys give a leaf, by one sequence of operations. Of larger blocks the longer side is cut
// where its tree has the root's second child; both halves give their sums, which are added. So what waits for its sibling
// is never more than twice the gradients themselves, and a leaf's keys stay packed for the next leaf.
//
// Source: the tree of pairwise summation (Blanchard, Higham, Mary 2020), for Dao et al. 2022 (FlashAttention, algorithm 4).
#include "operations.h"
#include "backward_block.h"

namespace SHARDSUM_ISA {

// The rows and keys of one KV head.
template <typename E> class HeadByHalves {
    typedef Sum<typename PackedOf<E>::type> T;

    // Where the sums of a block are added: its first row in the group's first head, and its first key.
    struct Sums {
        T *q, *k, *v;
        int64_t q_head;  // from head to head
    };

public:
    HeadByHalves(const Backward& a, Scratch& scratch, int64_t head)
        : a(a), sequence(head / a.kv_heads), kv_head(head % a.kv_heads), group(a.q_heads / a.kv_heads),
          tiles((a.q_len + ROWS - 1) / ROWS), chunk(a), tile(a), block(a, chunk, tile) {
        place(Places(scratch.get<char>(place(Places(nullptr)))));
        chunk.size = 0;
        for (int64_t t = 0; t < tiles; t++) {
            spans[t] = {a.kv_len, 0, 0, a.kv_len};
            for (int64_t p = t * ROWS; p < std::min((t + 1) * ROWS, a.q_len); p++)
                spans[t].add(seen(a, sequence, p, 0, a.kv_len));
            if ((t + 1) * ROWS > a.q_len) spans[t].all_end = 0;  // the rows behind the last see nothing
        }
    }

    // The gradients' tensors hold zeros.
    void run() {
        const int64_t head = sequence * a.kv_heads + kv_head;
        of({0, a.q_len}, {0, a.kv_len},
           {static_cast<T*>(a.d_q) + head * group * a.q_len * a.head_dim, static_cast<T*>(a.d_k) + head * a.kv_len * a.head_dim,
            static_cast<T*>(a.d_v) + head * a.kv_len * a.v_dim, a.q_len * a.head_dim});
    }

private:
    const Backward& a;
    const int64_t sequence, kv_head, group, tiles;
    Chunk<E> chunk;
    TileOfQueries<E> tile;
    Block<E> block;
    Span* spans;  // of the tiles, the same for all heads
    T* spare;     // sums that wait for their siblings, one behind the other

    int64_t place(Places places) {
        chunk.place(places);
        tile.place(places);
        block.place(places);
        places.take(spans, tiles);
        // A cut adds the shorter side to what waits, and halves the other.
        places.take(spare, 2 * std::max(a.head_dim + a.v_dim, group * a.head_dim) * (a.q_len + a.kv_len));
        return places.bytes();
    }

    static int64_t size(Seen some) { return some.end - some.begin; }

    bool visible(Seen rows, Seen keys) const {
        for (int64_t t = rows.begin / ROWS; t * ROWS < rows.end; t++)
            if (!spans[t].misses(keys.begin, size(keys))) return true;
        return false;
    }

    // Adds what rows and keys, whole nodes of their trees, give to each other.
    void of(Seen rows, Seen keys, Sums to) {
        if (!visible(rows, keys)) return;
        const int64_t longer = std::max(size(rows), size(keys));
        if (longer <= a.segment) return leaf(rows, keys, to);
        int64_t half = a.segment;
        while (2 * half < longer) half *= 2;
        if (size(rows) > size(keys)) cut_rows(rows, rows.begin + half, keys, to);
        else cut_keys(rows, keys, keys.begin + half, to);
    }

    void cut_rows(Seen rows, int64_t middle, Seen keys, Sums to) {
        Sums below = to;
        below.q += (middle - rows.begin) * a.head_dim;
        of({rows.begin, middle}, keys, to);
        if (!visible({middle, rows.end}, keys)) return;
        const int64_t of_k = size(keys) * a.head_dim, count = of_k + size(keys) * a.v_dim;
        below.k = taken(count), below.v = below.k + of_k;
        of({middle, rows.end}, keys, below);
        add(below.k, of_k, to.k);
        add(below.v, count - of_k, to.v);
        spare -= count;
    }

    void cut_keys(Seen rows, Seen keys, int64_t middle, Sums to) {
        Sums right = to;
        right.k += (middle - keys.begin) * a.head_dim, right.v += (middle - keys.begin) * a.v_dim;
        of(rows, {keys.begin, middle}, to);
        if (!visible(rows, {middle, keys.end})) return;
        right.q_head = size(rows) * a.head_dim;
        right.q = taken(group * right.q_head);
        of(rows, {middle, keys.end}, right);
        for (int64_t g = 0; g < group; g++) add(right.q + g * right.q_head, right.q_head, to.q + g * to.q_head);
        spare -= group * right.q_head;
    }

    T* taken(int64_t count) {
        T* some = spare;
        std::fill(some, some + count, T(0));
        spare += count;
        return some;
    }

    static void add(const T* from, int64_t count, T* to) {
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    }

    void leaf(Seen rows, Seen keys, Sums to) {
        for (int64_t key = keys.begin; key < keys.end; key += chunk.most) {
            const int64_t some = std::min(chunk.most, keys.end - key);
            if (chunk.size == some && chunk.first == key) chunk.clear();
            else chunk.pack(sequence, kv_head, key, some);
            for (int64_t g = 0; g < group; g++)
                for (int64_t p = rows.begin; p < rows.end; p += ROWS)
                    if (!spans[p / ROWS].misses(key, some)) meet(g, p, rows, to);
            chunk.write(to.k + (key - keys.begin) * a.head_dim, to.v + (key - keys.begin) * a.v_dim);
        }
    }

    // The chunk and the tile of rows that begins at position p, of one head.
    void meet(int64_t g, int64_t p, Seen rows, Sums to) {
        const Span& span = spans[p / ROWS];
        tile.pack(sequence, kv_head, g * a.q_len + p, std::min(ROWS, rows.end - p), chunk.first, chunk.size);
        for (int64_t key = 0; key < chunk.size; key += BLOCK_KEYS) {
            const int64_t count = std::min(BLOCK_KEYS, chunk.size - key);
            if (!span.misses(chunk.first + key, count)) block.run(key, count, span);
        }
        tile.write([&](int64_t r) { return to.q + g * to.q_head + (p - rows.begin + r) * a.head_dim; });
    }
};

template <typename E> void run_backward_tree(const Backward& a) {
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Scratch scratch;
        TileRegisters registers;
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < a.batch * a.kv_heads; head++) HeadByHalves<E>(a, scratch, head).run();
    }
}

void backward_tree(const Backward& a) {
    with_element_of(a.type, [&](auto element) { run_backward_tree<decltype(element)>(a); });
}

}  // namespace SHARDSUM_ISA
