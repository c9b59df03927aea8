// What a block of weights gives to gradients: the five products of backward, and the weights between them.
#pragma once

#include "backward_pack.h"

namespace SHARDSUM_ISA {

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
        multiply_scores<P>({left + key * inner, inner, 1, columns, ROWS, products, ROWS, keys, ROWS, inner, false});
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
                s[r] -= tile.slopes[r] * T(std::abs(tile.diagonal[r] - a.keys[index]));
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

}  // namespace SHARDSUM_ISA
