// Gradients of attention, the weights computed again from the final lse.
//
// A task is a part of the query rows of one KV head. It takes chunk after chunk of the keys, which lies in L2 with the
// sums of its gradients, and for each, tile after tile of the rows: five products for each block of weights, no more.
// Where there are fewer heads than threads a head's rows are several tasks', whose sums are added in order.
//
// Source: Dao et al. 2022 (FlashAttention, algorithm 4); Dao 2023 (FlashAttention-2, section 3.1).
#include <vector>

#include "operations.h"
#include "parts.h"

namespace SHARDSUM_ISA {

constexpr int64_t PARTIAL_BYTES = 256 << 20;  // of sums of d_k and d_v that are still to be added

// The weights of a block of keys for a tile, and their gradients: P^T and dS^T.
template <typename E> class Block {
    typedef typename PackedOf<E>::type P;
    typedef Sum<P> T;
    static constexpr bool paired = std::is_same_v<P, Pair>;

public:
    Block(const Backward& a, Chunk<E>& chunk, TileOfQueries<E>& tile) : a(a), chunk(chunk), tile(tile) {}

    void place(Places& places) {
        places.take(weights, BLOCK_KEYS * ROWS);
        places.take(scores, BLOCK_KEYS * ROWS);
        if (paired) places.take(paired_scores, BLOCK_KEYS / 2 * ROWS);
        if (plain()) return;
        places.take(derivatives, BLOCK_KEYS * ROWS);
        places.take(kept_weights, BLOCK_KEYS * ROWS);
    }

    // Adds what the chunk's keys [key, key + count) and the tile give to each other.
    void run(int64_t key, int64_t count, const Span& span) {
        const int64_t all = padded(count, KEY_STEP<P>);
        of_rows(chunk.k, chunk.head.inner, key, tile.q_columns, all, weights);
        of_rows(chunk.v, chunk.value.inner, key, tile.d_out_columns, all, scores);
        if (!plain()) finish(key, count);
        const bool covered = all == count && span.covers(chunk.first + key, count);
        if (!plain()) weigh<false, false>(key, all);
        else if (covered) weigh<true, true>(key, all);
        else weigh<true, false>(key, all);
        add(weights, tile.d_out_panels, chunk.value, all, chunk.d_v + key * chunk.value.sum);
        add(scores, tile.q_panels, chunk.head, all, chunk.d_k + key * chunk.head.sum);
        const P* right = paired ? paired_scores : reinterpret_cast<P*>(scores);
        multiply<P>({chunk.k_transposed + key / ELEMENTS<P>, chunk.row_of_transposed(), 1, right, ROWS, tile.d_q, ROWS,
                     padded(a.head_dim, ROW_STEP<P>), ROWS, all / ELEMENTS<P>, true});
    }

private:
    const Backward& a;
    Chunk<E>& chunk;
    TileOfQueries<E>& tile;
    T *weights, *scores;  // products, then the weights and gradients of scores in their place, as P along the rows
    P* paired_scores;     // the gradients once more, as pairs along the keys
    T *derivatives, *kept_weights;

    struct Both {
        Vector<T> weight, score;
    };

    bool plain() const { return is_plain(a) && a.dropout_p == 0; }

    // The products of keys or values with the tile's rows.
    static void of_rows(const P* left, int64_t inner, int64_t key, const P* columns, int64_t keys, T* products) {
        multiply<P>({left + key * inner, inner, 1, columns, ROWS, products, ROWS, keys, ROWS, inner, false});
    }

    static void add(const T* left, const P* panels, const Widths<P>& widths, int64_t keys, T* sums) {
        for (int64_t c = 0; c < widths.sum; c += PANEL<P>, panels += ROWS / ELEMENTS<P> * PANEL<P>)
            multiply<P>({reinterpret_cast<const P*>(left), ROWS, 1, panels, PANEL<P>, sums + c, widths.sum, keys,
                         std::min(int64_t(PANEL<P>), widths.sum - c), ROWS / ELEMENTS<P>, true});
    }

    // From products to scores, their derivatives by the scaled products, and what dropout multiplies weights by.
    void finish(int64_t key, int64_t count) {
        for (int64_t j = 0; j < count; j++) {
            const int64_t index = chunk.first + key + j;
            T *s = weights + j * ROWS, *derivative = derivatives + j * ROWS, *kept_weight = kept_weights + j * ROWS;
            for (int64_t r = 0; r < ROWS; r += lanes<T>) {
                Vector<T> x = load(s + r) * query_factor<T>(a), by_x = broadcast(T(1));
                if (a.softcap != 0) {
                    x = tanh_of<T>(x);
                    by_x -= x * x;
                    x *= T(a.softcap * LOG2_E);
                }
                store_vector(s + r, x);
                store_vector(derivative + r, by_x);
            }
            for (int64_t r = 0; r < ROWS && a.alibi_slopes != nullptr; r++)
                s[r] -= tile.slopes[r] * T(std::abs(tile.own[r] - a.keys[index]));
            for (int64_t r = 0; r < ROWS; r++)
                kept_weight[r] = a.dropout_p == 0 ? T(1) : T(kept(a, tile.words[r], index));
        }
    }

    template <bool PLAIN, bool COVERED> void weigh(int64_t key, int64_t all) {
        constexpr int64_t n = lanes<T>;
        for (int64_t j = 0; j < all; j += ELEMENTS<P>)
            for (int64_t r = 0; r < ROWS; r += n * ELEMENTS<P>) {
                T *to_weights = weights + j * ROWS, *to_scores = scores + j * ROWS;
                Both first = both<PLAIN, COVERED>(key, j, r);
                if constexpr (paired) {
                    Both second = both<PLAIN, COVERED>(key, j, r + n);
                    Both below = both<PLAIN, COVERED>(key, j + 1, r);
                    Both last = both<PLAIN, COVERED>(key, j + 1, r + n);
                    Halves upper = rounded(first.score, second.score), lower = rounded(below.score, last.score);
                    store_vector(reinterpret_cast<bfloat16*>(to_weights) + r, rounded(first.weight, second.weight));
                    store_vector(reinterpret_cast<bfloat16*>(to_weights + ROWS) + r, rounded(below.weight, last.weight));
                    store_vector(reinterpret_cast<bfloat16*>(to_scores) + r, upper);
                    store_vector(reinterpret_cast<bfloat16*>(to_scores + ROWS) + r, lower);
                    Pair* pairs = paired_scores + j / 2 * ROWS + r;
                    store_vector(pairs, alternated<0>(upper, lower));
                    store_vector(pairs + n, alternated<1>(upper, lower));
                } else {
                    store_vector(to_weights + r, first.weight);
                    store_vector(to_scores + r, first.score);
                }
            }
    }

    // Of the key j of the block and the rows from r on.
    template <bool PLAIN, bool COVERED> Both both(int64_t key, int64_t j, int64_t r) const {
        const int64_t at = j * ROWS + r;
        Vector<T> x = load(weights + at), gradient = load(scores + at);
        Vector<T> lse = load(tile.lse + r), delta = load(tile.delta + r);
        Vector<T> weight = exp2(PLAIN ? x * query_factor<T>(a) - lse : x - lse), score;
        if (PLAIN) {
            score = weight * (gradient - delta);
        } else {
            Vector<T> kept_weight = load(kept_weights + at);
            score = weight * (gradient * kept_weight - delta) * load(derivatives + at);
            weight *= kept_weight;
        }
        if (COVERED) return {weight, score};
        typedef Vector<Integer<T>> Integers;
        const Integer<T> own = Integer<T>(key + j);
        Integers visible = (load_vector<Integers>(tile.lo + r) <= own) & (load_vector<Integers>(tile.hi + r) > own);
        return {select<T>(visible, weight, Vector<T>{}), select<T>(visible, score, Vector<T>{})};
    }
};

// How the work is cut: the rows of a KV head into parts, and where there are several, the keys into ranges, so that the
// parts' sums over a range do not fill the memory.
template <typename E> struct Cut {
    typedef Sum<typename PackedOf<E>::type> T;
    int64_t heads, rows, parts, rows_of_a_part, keys;

    explicit Cut(const Backward& a)
        : heads(a.batch * a.kv_heads), rows(a.q_heads / a.kv_heads * a.q_len), parts(1), keys(a.kv_len) {
        const int64_t tiles = (rows + ROWS - 1) / ROWS;
        // Four for each thread end nearly together. Along the tree of segments the threads must not matter.
        if (a.segment == 0 && heads < 4 * a.threads && heads % a.threads != 0)
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
        tile.write();
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
