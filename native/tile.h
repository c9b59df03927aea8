// A tile of rows and the keys that it sees: what prefill and the tree do between packing and sums.
//
// A tile's rows are packed once, and each block of keys once per tile. Then strip after strip of the rows goes through
// the block: products, weights, values, so that a strip's scores never leave the nearest cache.
//
// Source: Dao et al. 2022 (FlashAttention, algorithm 1); Goto and van de Geijn 2008 (panels that lie in cache).
#pragma once

#include <iterator>
#include <utility>

#include "in_place.h"
#include "matrix.h"
#include "pack.h"
#include "scores.h"
#include "scratch.h"
#include "row_sums.h"

namespace SHARDSUM_ISA {

// Of a block and of a strip. A block's panel of values and a strip's scores lie in L1 (32 to 48 KB).
template <typename P> constexpr int64_t KEYS = std::is_same_v<P, Pair> ? 256 : 128;
template <typename P> constexpr int64_t STRIP = ROW_STEP<P> == 1 ? 8 * TILE_ROWS : ROW_STEP<P>;
constexpr int64_t TILE_BYTES = 1 << 20;  // of a tile's queries and sums: a part of L2

// A tile: all query heads of one KV head, at `count` query positions from `first` on. Row r is head r / count.
struct Tile {
    int64_t sequence, kv_head, first, count;
};

template <typename E> class TileOfRows {
    typedef typename PackedOf<E>::type P;
    typedef Sum<P> T;
    static constexpr bool paired = std::is_same_v<P, Pair>;
    static constexpr int64_t PER = ELEMENTS<P>;
    static constexpr int64_t KEY_STEP = std::max(int64_t(2 * lanes<T>), int64_t(INNER_STEP<P> * PER));

public:
    TileOfRows(const Forward& a, Tile t, Scratch& scratch)
        : a(a), t(t), group(a.q_heads / a.kv_heads), rows(group * t.count), plain(is_plain(a)),
          inner(padded((a.head_dim + PER - 1) / PER, INNER_STEP<P>)), v_width(padded(a.v_dim, lanes<T>)) {
        const int64_t many = padded(rows, STRIP<P>);
        place(scratch.get<char>(place(nullptr, many)), many);
        std::fill(sum, sum + many * v_width, T(0));
        std::fill(total, total + many * lanes<T>, T(0));
        std::fill(top, top + many, -INFINITY);
        pack_queries();
        find_seen();
    }

    // Adds the keys [begin, end) to the rows' sums, `begin` being a block's first. after(r, last) is called when the strip
    // that begins with row r is through with a block, the last one or not, whether its rows see some of it or not.
    template <typename After> void attend(int64_t begin, int64_t end, After after) {
        end = std::min(end, whole.end);
        for (int64_t key = std::max(whole.begin / KEYS<P> * KEYS<P>, begin); key < end; key += KEYS<P>)
            block(key, std::min(KEYS<P>, a.kv_len - key), [&](int64_t r) { after(r, key + KEYS<P> >= end); });
    }

    // The sums as the rows' output.
    void write() const {
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = number(r);
            T* out = static_cast<T*>(a.out) + at * a.v_dim;
            T weight = sum_of<T>(load(total + r * lanes<T>));
            for (int64_t j = 0; j < a.v_dim; j++) out[j] = weight == 0 ? T(0) : sum[r * v_width + j] / weight;
            static_cast<T*>(a.lse)[at] = weight == 0 ? -INFINITY : T((top[r] + std::log2(double(weight))) * LN_2);
        }
    }

    int64_t count() const { return rows; }
    int64_t strip_rows(int64_t r) const { return std::min(STRIP<P>, rows - r); }
    // Whether the strip that begins with row r sees any of the keys [begin, begin + size).
    bool sees_some(int64_t r, int64_t begin, int64_t size) const { return !strips[r / STRIP<P>].misses(begin, size); }
    Sums<T> sums(int64_t r) const { return {sum + r * v_width, total + r * lanes<T>, top + r, v_width}; }
    // Row r of the tile among all rows.
    int64_t number(int64_t r) const { return (t.sequence * a.q_heads + head(r)) * a.q_len + position(r); }

private:
    const Forward& a;
    const Tile t;
    const int64_t group, rows;
    const bool plain;
    const int64_t inner, v_width;
    P *q, *k, *v;
    T *scores, *sum, *total, *top;  // total: a vector for each row
    Seen* sees;
    Span* strips;
    Span whole;
    bool keys_packed[KEYS<P> / PANEL<P>], values_packed[LARGEST_DIM / PANEL<P> + 1];  // of this block, by panels
    bool all_values_finite[LARGEST_DIM / PANEL<P> + 1];

    // How many bytes hold everything of `many` rows; it is placed there if `memory` is given.
    int64_t place(char* memory, int64_t many) {
        Places places(memory);
        places.take(q, many * inner);
        places.take(k, KEYS<P> * inner);
        places.take(v, KEYS<P> / PER * padded(a.v_dim, PANEL<P>));
        places.take(scores, STRIP<P> * KEYS<P>);
        places.take(sum, many * v_width);
        places.take(total, many * lanes<T>);
        places.take(top, many);
        places.take(sees, many);
        places.take(strips, many / STRIP<P>);
        return places.bytes();
    }

    int64_t position(int64_t r) const { return t.first + r % t.count; }
    int64_t head(int64_t r) const { return t.kv_head * group + r / t.count; }
    P* values(int64_t j, int64_t column) const {
        return v + column / PANEL<P> * (KEYS<P> / PER * PANEL<P>) + j / PER * PANEL<P> + column % PANEL<P>;
    }

    void pack_queries() {
        int sign = query_factor<T>(a) < 0 ? -1 : 1;
        for (int64_t g = 0; g < group; g++) {
            const E* from = row_of<E>(a.q, t.sequence, t.kv_head * group + g, t.first);
            P* to = q + g * t.count * inner;
            if constexpr (paired) pack_rows(from, a.q.row, t.count, a.head_dim, sign, to, inner);
            else pack_rows(from, a.q.row, t.count, a.head_dim, T(sign), to, inner);
        }
        std::fill(q + rows * inner, q + padded(rows, STRIP<P>) * inner, P{});
    }

    void find_seen() {
        whole = {a.kv_len, 0, 0, a.kv_len};
        for (int64_t r = 0; r < rows; r++) {
            sees[r] = seen(a, t.sequence, position(r), 0, a.kv_len);
            if (r % STRIP<P> == 0) strips[r / STRIP<P>] = {a.kv_len, 0, 0, a.kv_len};
            strips[r / STRIP<P>].add(sees[r]);
            whole.add(sees[r]);
        }
    }

    template <typename After> void block(int64_t key, int64_t size, After after) {
        std::fill(keys_packed, std::end(keys_packed), false);
        std::fill(values_packed, std::end(values_packed), false);
        if (const int64_t more = std::min(KEYS<P>, a.kv_len - key - 2 * KEYS<P>); more > 0) {
            ask_for_pages(row_of<E>(a.k, t.sequence, t.kv_head, key + 2 * KEYS<P>), more, a.k.row);
            ask_for_pages(row_of<E>(a.v, t.sequence, t.kv_head, key + 2 * KEYS<P>), more, a.v.row);
        }
        for (int64_t r = 0; r < rows; r += STRIP<P>) {
            if (!strips[r / STRIP<P>].misses(key, size)) strip(r, key, size);
            after(r);
        }
    }

    // The panel of a block's keys from `first` on, once for all strips that need it.
    void pack_keys(int64_t key, int64_t size, int64_t first) {
        if (std::exchange(keys_packed[first / PANEL<P>], true)) return;
        for (int64_t j = first; j < std::min(first + PANEL<P>, padded(size, lanes<T>)); j += lanes<T>) {
            const E* from = row_of<E>(a.k, t.sequence, t.kv_head, key + j);
            const int64_t some = std::min(int64_t(lanes<T>), size - j);
            P* to = k + first * inner + j % PANEL<P>;
            if constexpr (paired) pack_columns(from, a.k.row, some, a.head_dim, inner, to, PANEL<P>, KEYS<P> * a.k.row);
            else pack_columns(from, a.k.row, some, a.head_dim, to, PANEL<P>, KEYS<P> * a.k.row);
        }
    }

    // The panel of a block's values from column c on.
    void pack_values(int64_t key, int64_t size, int64_t c) {
        if (std::exchange(values_packed[c / PANEL<P>], true)) return;
        const int64_t some = std::min(int64_t(PANEL<P>), a.v_dim - c), all = padded(size, KEY_STEP);
        bool finite = true;
        for (int64_t j = 0; j < all; j += KEY_STEP) {
            const E* from = row_of<E>(a.v, t.sequence, t.kv_head, key + j) + c;
            const int64_t count = std::max(std::min(KEY_STEP, size - j), int64_t(0));
            if constexpr (paired) pack_row_pairs(from, a.v.row, count, some, KEY_STEP / 2, values(j, c), PANEL<P>, KEYS<P> * a.v.row);
            else pack_rows(from, a.v.row, count, some, T(1), values(j, c), PANEL<P>);
            if constexpr (!paired) std::fill(values(j + count, c), values(j + KEY_STEP, c), P{});
            finite &= packed_finite(values(j, c), KEY_STEP / PER * PANEL<P>);
        }
        all_values_finite[c / PANEL<P>] = finite;
        if (!finite) take_out_bad_values(key, size, c);
    }

    bool is_bad(int64_t key, int64_t c) const {
        return !all_finite<T>(row_of<E>(a.v, t.sequence, t.kv_head, key) + c, std::min(int64_t(PANEL<P>), a.v_dim - c));
    }

    // 0 * NaN is NaN: values that are not finite leave the products, and are added to the rows that see them.
    void take_out_bad_values(int64_t key, int64_t size, int64_t c) {
        for (int64_t j = 0; j < size; j++) {
            if (!is_bad(key + j, c)) continue;
            for (int64_t i = 0; i < PANEL<P>; i++) {
                if constexpr (paired) values(j, c + i)->bits &= j % 2 ? 0x0000FFFF : 0xFFFF0000;
                else *values(j, c + i) = 0;
            }
        }
    }

    void strip(int64_t r, int64_t key, int64_t size) {
        const Span& span = strips[r / STRIP<P>];
        int64_t begin = std::max(span.begin - key, int64_t(0)) / KEY_STEP * KEY_STEP;
        int64_t end = padded(std::min(span.end - key, size), KEY_STEP);
        int64_t count = strip_rows(r), padded_count = padded(count, ROW_STEP<P>);
        for (int64_t j = begin / PANEL<P> * PANEL<P>; j < end; j += PANEL<P>) {
            if (multiply_keys_in_place(r, key, size, j, std::min(j + PANEL<P>, end))) continue;
            pack_keys(key, size, j);
            multiply_scores<P>({q + r * inner, inner, 1, k + j * inner, PANEL<P>, scores + j, KEYS<P>, padded_count,
                                std::min(int64_t(PANEL<P>), end - j), inner, false});
        }
        if (plain && a.dropout_p == 0 && size % KEY_STEP == 0 && span.covers(key, size))
            for (int64_t i = 0; i < count; i++) weigh<false>(r + i, key, {0, size}, product_factor<T>(a), scores + i * KEYS<P>);
        else
            for (int64_t i = 0; i < count; i++) mask_and_weigh(r + i, key, size, {begin, end}, scores + i * KEYS<P>);
        if (add_values_in_place(r, key, size, begin, end)) return;
        for (int64_t c = 0; c < v_width; c += PANEL<P>) {
            pack_values(key, size, c);
            multiply<P>({reinterpret_cast<P*>(scores) + begin / PER, KEYS<P>, 1, values(begin, c), PANEL<P>,
                         sum + r * v_width + c, v_width, padded_count, std::min(int64_t(PANEL<P>), v_width - c),
                         (end - begin) / PER, true});
            for (int64_t j = begin; j < std::min(end, size) && !all_values_finite[c / PANEL<P>]; j++)
                if (is_bad(key + j, c)) add_values(r, count, key, j, c);
        }
    }

    // Whether few rows meet whole vectors: then what is read only once is not packed.
    bool is_in_place(int64_t size, int64_t end, int64_t elements) const {
        return ROW_STEP<P> == 1 && rows <= TILE_ROWS && end <= size && elements % ELEMENTS_AT_ONCE<P> == 0;
    }

    bool multiply_keys_in_place(int64_t r, int64_t key, int64_t size, int64_t begin, int64_t end) {
        if (!is_in_place(size, end, a.head_dim)) return false;
        const RowsInMemory<E> keys{row_of<E>(a.k, t.sequence, t.kv_head, key + begin), a.k.row, KEYS<P> * a.k.row};
        with_rows(rows, [&](auto count) {
            multiply_keys<count()>(q + r * inner, inner, keys, end - begin, a.head_dim, scores + begin, KEYS<P>);
        });
        return true;
    }

    // False where values must be packed, also where they are not finite, which the products show.
    bool add_values_in_place(int64_t r, int64_t key, int64_t size, int64_t begin, int64_t end) {
        if (!is_in_place(size, end, a.v_dim)) return false;
        const RowsInMemory<E> values{row_of<E>(a.v, t.sequence, t.kv_head, key + begin), a.v.row, KEYS<P> * a.v.row};
        alignas(64) T fresh[TILE_ROWS * LARGEST_DIM];
        std::fill(fresh, fresh + rows * v_width, T(0));
        with_rows(rows, [&](auto count) {
            add_values_of_rows<count()>(reinterpret_cast<P*>(scores) + begin / PER, KEYS<P>, values, end - begin, a.v_dim, fresh, v_width);
        });
        if (!packed_finite(fresh, rows * v_width)) return false;
        for (int64_t i = 0; i < rows * v_width; i += lanes<T>)
            store_vector(sum + r * v_width + i, load(sum + r * v_width + i) + load(fresh + i));
        return true;
    }

    // To the rows that see it, what key j of the block holds in one panel of columns.
    void add_values(int64_t r, int64_t count, int64_t key, int64_t j, int64_t c) {
        typedef std::conditional_t<paired, bfloat16, T> Weight;
        const E* value = row_of<E>(a.v, t.sequence, t.kv_head, key + j);
        for (int64_t i = 0; i < count; i++) {
            if (key + j < sees[r + i].begin || key + j >= sees[r + i].end) continue;
            T weight = element(reinterpret_cast<const Weight*>(scores + i * KEYS<P>)[j]);
            for (int64_t d = c; d < std::min(c + PANEL<P>, a.v_dim); d++) sum[(r + i) * v_width + d] += weight * T(element(value[d]));
        }
    }

    // From a row's products to its weights in `range`, 0 where the row does not see.
    void mask_and_weigh(int64_t r, int64_t key, int64_t size, Seen range, T* s) {
        Seen visible{std::max(sees[r].begin - key, int64_t(0)), std::min(sees[r].end - key, size)};
        if (visible.begin >= visible.end) return clear(s, range);
        T scale = product_factor<T>(a);
        if (!plain) {
            for (int64_t j = range.begin; j < range.end; j += lanes<T>) store_vector(s + j, load(s + j) * scale);
            finish_scores(a, t.sequence, head(r), position(r), key, size, s);
            scale = 1;
        }
        Seen steps{visible.begin / KEY_STEP * KEY_STEP, padded(visible.end, KEY_STEP)};
        std::fill(s + steps.begin, s + visible.begin, -INFINITY);
        std::fill(s + visible.end, s + steps.end, -INFINITY);
        if (a.dropout_p == 0) weigh<false>(r, key, steps, scale, s);
        else weigh<true>(r, key, steps, scale, s);
        clear(s, {range.begin, steps.begin});
        clear(s, {steps.end, range.end});
    }

    static void clear(T* s, Seen range) {
        std::fill(reinterpret_cast<P*>(s) + range.begin / PER, reinterpret_cast<P*>(s) + range.end / PER, P{});
    }

    // The weights, under the row's new maximum, in place of the products.
    template <bool DROPOUT> void weigh(int64_t r, int64_t key, Seen steps, T scale, T* s) {
        constexpr int n = lanes<T>;
        Vector<T> highest[2] = {broadcast(T(-INFINITY)), broadcast(T(-INFINITY))};
        for (int64_t j = steps.begin; j < steps.end; j += 2 * n)
            for (int i = 0; i < 2; i++) highest[i] = maximum<T>(load(s + j + i * n), highest[i]);
        highest[0] = maximum<T>(highest[0], highest[1]) * scale;
        if (any<T>(highest[0] > top[r])) raise(r, maximum_of<T>(highest[0]));
        if (round_large_scores(top[r], steps.begin, steps.end, scale, s)) scale = 1;
        T kept_weights[DROPOUT ? KEYS<P> : 1];
        if (DROPOUT) find_kept_weights(r, key, steps, kept_weights);
        Vector<T> now = broadcast(top[r] == -INFINITY ? T(0) : top[r]), sums = load(total + r * n), more{};
        for (int64_t j = steps.begin; j < steps.end; j += 2 * n) {
            Vector<T> first = exp2(load(s + j) * scale - now);
            Vector<T> second = exp2(load(s + j + n) * scale - now);
            sums += first, more += second;
            if (DROPOUT) first *= load(kept_weights + j), second *= load(kept_weights + j + n);
            store_weights(s, j, first, second);
        }
        store_vector(total + r * n, sums + more);
    }

    // What was summed under a smaller maximum is scaled down.
    void raise(int64_t r, T highest) {
        T shrunk = top[r] == -INFINITY ? T(0) : exp2(broadcast(top[r] - highest))[0];
        top[r] = highest;
        store_vector(total + r * lanes<T>, load(total + r * lanes<T>) * shrunk);
        T* row = sum + r * v_width;
        for (int64_t j = 0; j < v_width; j += lanes<T>) store_vector(row + j, load(row + j) * shrunk);
    }

    void find_kept_weights(int64_t r, int64_t key, Seen steps, T* to) const {
        uint64_t word = dropout_word(a, t.sequence, head(r), position(r));
        int64_t end = std::min(steps.end, a.kv_len - key);
        for (int64_t j = steps.begin; j < end; j++) to[j] = T(kept(a, word, key + j));
        std::fill(to + end, to + steps.end, T(0));
    }

    static void store_weights(T* s, int64_t j, Vector<T> first, Vector<T> second) {
        if constexpr (paired) return store_vector(reinterpret_cast<bfloat16*>(s) + j, rounded(first, second));
        store_vector(s + j, first);
        store_vector(s + j + lanes<T>, second);
    }
};

// Large tiles pack the keys seldom; eight for each thread keep all threads at work to the end.
template <typename P> int64_t positions_of_a_tile(const Forward& a) {
    int64_t group = a.q_heads / a.kv_heads, share = a.batch * a.q_heads * a.q_len / (8 * a.threads);
    int64_t most = TILE_BYTES / int64_t(sizeof(Sum<P>)) / (a.head_dim + a.v_dim);
    int64_t positions = std::max(STRIP<P>, std::min(most, share) / group / STRIP<P> * STRIP<P>);
    return std::max(int64_t(1), std::min(a.q_len, positions));
}

}  // namespace SHARDSUM_ISA
