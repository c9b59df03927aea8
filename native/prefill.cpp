// Attention of many rows: tiles of rows against blocks of keys, the softmax taken online.
//
// A tile's rows are packed once, and each block of keys once per tile. Then strip after strip of the rows goes through
// the block: products, weights, values, so that a strip's scores never leave the nearest cache.
//
// Source: Dao et al. 2022 (FlashAttention, algorithm 1); Goto and van de Geijn 2008 (panels that lie in cache).
#include "matrix.h"
#include "operations.h"
#include "pack.h"
#include "scores.h"
#include "scratch.h"

namespace SHARDSUM_ISA {

constexpr int64_t ROWS = 768, KEYS = 256;  // of a tile at most, and of a block
template <typename P> constexpr int64_t STRIP = ROW_STEP<P> == 1 ? 8 * TILE_ROWS : ROW_STEP<P>;

// What elements are packed as for products: as they are, or wider where no instruction takes them.
template <typename E> struct PackedOf { typedef float type; };
template <> struct PackedOf<double> { typedef double type; };
#if defined(__AVX512BF16__)
template <> struct PackedOf<bfloat16> { typedef Pair type; };
#endif

// A tile: all query heads of one KV head, at `count` query positions from `first` on. Row r is head r / count.
struct Tile {
    int64_t sequence, kv_head, first, count;
};

// Packed matrices of elements E: rows of `inner`, the queries and weights, and panels, the keys and values.
template <typename E> class TileOfRows {
    typedef typename PackedOf<E>::type P;
    typedef Sum<P> T;
    static constexpr bool paired = std::is_same_v<P, Pair>;
    static constexpr int64_t PER = paired ? 2 : 1;  // elements in one of P
    static constexpr int64_t KEY_STEP = std::max(int64_t(2 * lanes<T>), INNER_STEP<P> * PER);

public:
    TileOfRows(const Forward& a, Tile t, Scratch& scratch) : a(a), t(t), group(a.q_heads / a.kv_heads), rows(group * t.count) {
        int64_t padded_rows = padded(rows, STRIP<P>);
        int64_t sizes[] = {padded_rows * inner(), KEYS * inner(), KEYS / PER * padded(a.v_dim, PANEL<P>),
                           STRIP<P> * KEYS, padded_rows * v_width(), padded_rows, padded_rows};
        int64_t bytes[8] = {0};
        for (int i = 0; i < 7; i++) bytes[i + 1] = bytes[i] + padded(sizes[i] * int64_t(i < 3 ? sizeof(P) : sizeof(T)), 64);
        char* memory = scratch.get<char>(bytes[7]);
        q = reinterpret_cast<P*>(memory), k = reinterpret_cast<P*>(memory + bytes[1]);
        v = reinterpret_cast<P*>(memory + bytes[2]), scores = reinterpret_cast<T*>(memory + bytes[3]);
        sum = reinterpret_cast<T*>(memory + bytes[4]), top = reinterpret_cast<T*>(memory + bytes[5]);
        total = reinterpret_cast<T*>(memory + bytes[6]);
        std::fill(sum, sum + padded_rows * v_width(), T(0));
        std::fill(top, top + rows, -INFINITY);
        std::fill(total, total + rows, T(0));
    }

    void run() {
        pack_queries();
        Seen range = seen_by(0, t.count, 0, a.kv_len);
        for (int64_t key = range.begin / KEYS * KEYS; key < range.end; key += KEYS) block(key, std::min(KEYS, a.kv_len - key));
        write();
    }

private:
    const Forward& a;
    const Tile t;
    const int64_t group, rows;
    P *q, *k, *v;
    T *scores, *sum, *top, *total;
    int64_t keys[KEYS];  // of the values in this block that are not finite
    int64_t bad = 0;

    int64_t inner() const { return padded((a.head_dim + PER - 1) / PER, INNER_STEP<P>); }
    int64_t v_width() const { return padded(a.v_dim, lanes<T>); }
    int64_t position(int64_t r) const { return t.first + r % t.count; }
    int64_t head(int64_t r) const { return t.kv_head * group + r / t.count; }

    // What products are multiplied by: never 0, for -inf marks what is masked.
    T factor() const { return std::max(std::abs(query_factor<T>(a)), std::numeric_limits<T>::min()); }

    // The keys of a block from the first that one of the rows sees to the last.
    Seen seen_by(int64_t first, int64_t count, int64_t key, int64_t size) const {
        Seen all{size, 0};
        for (int64_t r = first; r < first + count; r++) {
            Seen s = seen(a, t.sequence, position(r), key, size);
            if (s.begin < s.end) all = {std::min(all.begin, s.begin), std::max(all.end, s.end)};
        }
        return all;
    }

    void pack_queries() {
        int sign = query_factor<T>(a) < 0 ? -1 : 1;
        for (int64_t g = 0; g < group; g++) {
            const E* from = row_of<E>(a.q, t.sequence, t.kv_head * group + g, t.first);
            P* to = q + g * t.count * inner();
            if constexpr (paired) pack_rows(from, a.q.row, t.count, a.head_dim, sign, to, inner());
            else pack_rows(from, a.q.row, t.count, a.head_dim, T(sign), to, inner());
        }
        std::fill(q + rows * inner(), q + padded(rows, STRIP<P>) * inner(), P{});
    }

    void block(int64_t key, int64_t size) {
        Seen range = seen_by(0, t.count, key, size);
        if (range.begin >= range.end) return;
        pack_block(key, size);
        find_bad_values(key, range);
        for (int64_t r = 0; r < rows; r += STRIP<P>) strip(r, std::min(STRIP<P>, rows - r), key, size);
    }

    void pack_block(int64_t key, int64_t size) {
        const E *from_k = row_of<E>(a.k, t.sequence, t.kv_head, key), *from_v = row_of<E>(a.v, t.sequence, t.kv_head, key);
        for (int64_t j = 0; j < size; j += PANEL<P>) {
            int64_t some = std::min(int64_t(PANEL<P>), size - j);
            if constexpr (paired) pack_columns(from_k + j * a.k.row, a.k.row, some, a.head_dim, inner(), k + j * inner(), PANEL<P>);
            else pack_columns(from_k + j * a.k.row, a.k.row, some, a.head_dim, k + j * inner(), PANEL<P>);
        }
        int64_t whole = padded(size, KEY_STEP);
        for (int64_t c = 0; c < a.v_dim; c += PANEL<P>) {
            int64_t some = std::min(int64_t(PANEL<P>), a.v_dim - c);
            P* to = v + c / PANEL<P> * (KEYS / PER * PANEL<P>);
            if constexpr (paired) {
                pack_row_pairs(from_v + c, a.v.row, size, some, whole / 2, to, PANEL<P>);
            } else {
                pack_rows(from_v + c, a.v.row, size, some, T(1), to, PANEL<P>);
                std::fill(to + size * PANEL<P>, to + whole * PANEL<P>, P{});
            }
        }
    }

    // 0 * NaN is NaN: values that are not finite leave the products, and are added to the rows that see them.
    void find_bad_values(int64_t key, Seen range) {
        bad = 0;
        for (int64_t j = range.begin; j < range.end; j++) {
            if (all_finite<T>(row_of<E>(a.v, t.sequence, t.kv_head, key + j), a.v_dim)) continue;
            keys[bad++] = j;
            for (int64_t c = 0; c < padded(a.v_dim, PANEL<P>); c++) {
                P* panel = v + c / PANEL<P> * (KEYS / PER * PANEL<P>) + j / PER * PANEL<P> + c % PANEL<P>;
                if constexpr (paired) panel->bits &= j % 2 ? 0x0000FFFF : 0xFFFF0000;
                else *panel = 0;
            }
        }
    }

    void strip(int64_t r, int64_t count, int64_t key, int64_t size) {
        Seen range = seen_by(r, count, key, size);
        if (range.begin >= range.end) return;
        int64_t begin = range.begin / KEY_STEP * KEY_STEP, end = padded(range.end, KEY_STEP);
        int64_t padded_count = padded(count, ROW_STEP<P>);
        for (int64_t j = begin / PANEL<P> * PANEL<P>; j < end; j += PANEL<P>)
            multiply<P>({q + r * inner(), inner(), 1, k + j * inner(), PANEL<P>, scores + j, KEYS, padded_count,
                         std::min(int64_t(PANEL<P>), end - j), inner(), false});
        for (int64_t i = 0; i < count; i++) weigh(r + i, key, size, {begin, end}, scores + i * KEYS);
        for (int64_t c = 0; c < a.v_dim; c += PANEL<P>)
            multiply<P>({reinterpret_cast<P*>(scores) + begin / PER, KEYS, 1,
                         v + c * (KEYS / PER) + begin / PER * PANEL<P>, PANEL<P>, sum + r * v_width() + c, v_width(),
                         padded_count, std::min(int64_t(PANEL<P>), v_width() - c), (end - begin) / PER, true});
        for (int64_t i = 0; i < count && bad > 0; i++) add_bad_values(r + i, key, size, scores + i * KEYS);
    }

    void add_bad_values(int64_t r, int64_t key, int64_t size, const T* weights) {
        Seen visible = seen(a, t.sequence, position(r), key, size);
        typedef std::conditional_t<paired, bfloat16, T> Weight;
        for (int64_t i = 0; i < bad; i++) {
            if (keys[i] < visible.begin || keys[i] >= visible.end) continue;
            const E* value = row_of<E>(a.v, t.sequence, t.kv_head, key + keys[i]);
            T weight = element(reinterpret_cast<const Weight*>(weights)[keys[i]]);
            for (int64_t c = 0; c < a.v_dim; c++) sum[r * v_width() + c] += weight * T(element(value[c]));
        }
    }

    // From a row's products to its weights in `range`, 0 where the row does not see. What was summed before under a
    // smaller maximum is scaled down.
    void weigh(int64_t r, int64_t key, int64_t size, Seen range, T* s) {
        Seen visible = seen(a, t.sequence, position(r), key, size);
        if (visible.begin >= visible.end) return clear(s, range.begin, range.end);
        T scale = factor();
        if (!is_plain(a)) {
            for (int64_t j = range.begin; j < range.end; j += lanes<T>) store_vector(s + j, load(s + j) * scale);
            finish_scores(a, t.sequence, head(r), position(r), key, size, s);
            scale = 1;
        }
        int64_t begin = visible.begin / KEY_STEP * KEY_STEP, end = padded(visible.end, KEY_STEP);
        std::fill(s + begin, s + visible.begin, -INFINITY);
        std::fill(s + visible.end, s + end, -INFINITY);
        Vector<T> highest[2] = {broadcast(T(-INFINITY)), broadcast(T(-INFINITY))};
        for (int64_t j = begin; j < end; j += 2 * lanes<T>)
            for (int i = 0; i < 2; i++) highest[i] = maximum<T>(load(s + j + i * lanes<T>), highest[i]);
        rescale(r, maximum_of<T>(maximum<T>(highest[0], highest[1])) * scale);
        T now = top[r] == -INFINITY ? T(0) : top[r];
        total[r] += a.dropout_p == 0 ? exponentiate<false>(r, key, size, begin, end, scale, now, s)
                                     : exponentiate<true>(r, key, size, begin, end, scale, now, s);
        clear(s, range.begin, begin);
        clear(s, end, range.end);
    }

    void rescale(int64_t r, T highest) {
        if (!(highest > top[r])) return;
        T shrunk = top[r] == -INFINITY ? T(0) : exp2(broadcast(top[r] - highest))[0];
        top[r] = highest;
        total[r] *= shrunk;
        T* row = sum + r * v_width();
        for (int64_t j = 0; j < v_width(); j += lanes<T>) store_vector(row + j, load(row + j) * shrunk);
    }

    // Sum of the weights; the weights themselves, after dropout, take the place of the products.
    template <bool DROPOUT> T exponentiate(int64_t r, int64_t key, int64_t size, int64_t begin, int64_t end, T scale, T now, T* s) {
        T kept_weights[DROPOUT ? KEYS : 1];
        if (DROPOUT) {
            uint64_t word = dropout_word(a, t.sequence, head(r), position(r));
            for (int64_t j = begin; j < std::min(size, end); j++) kept_weights[j] = T(kept(a, word, key + j));
            std::fill(kept_weights + std::min(size, end), kept_weights + end, T(0));
        }
        Vector<T> sums[2] = {};
        for (int64_t j = begin; j < end; j += 2 * lanes<T>) {
            Vector<T> weights[2];
            for (int i = 0; i < 2; i++) {
                weights[i] = exp2_of<paired, T>(load(s + j + i * lanes<T>) * scale - now);
                sums[i] += weights[i];
                if (DROPOUT) weights[i] *= load(kept_weights + j + i * lanes<T>);
            }
            store_weights(s, j, weights[0], weights[1]);
        }
        return sum_of<T>(sums[0] + sums[1]);
    }

    static void clear(T* s, int64_t begin, int64_t end) {
        std::fill(reinterpret_cast<P*>(s) + begin / PER, reinterpret_cast<P*>(s) + end / PER, P{});
    }

    static void store_weights(T* s, int64_t j, Vector<T> first, Vector<T> second) {
#if defined(__AVX512BF16__)
        if constexpr (paired) return store_vector(reinterpret_cast<bfloat16*>(s) + j, _mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#endif
        store_vector(s + j, first);
        store_vector(s + j + lanes<T>, second);
    }

    void write() {
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (t.sequence * a.q_heads + head(r)) * a.q_len + position(r);
            T* out = static_cast<T*>(a.out) + at * a.v_dim;
            bool empty = total[r] == 0;
            for (int64_t j = 0; j < a.v_dim; j++) out[j] = empty ? T(0) : sum[r * v_width() + j] / total[r];
            static_cast<T*>(a.lse)[at] = empty ? -INFINITY : (top[r] + std::log2(total[r])) * T(LN_2);
        }
    }
};

// Large tiles pack the keys seldom; eight for each thread keep all threads at work to the end.
inline int64_t positions_of_a_tile(const Forward& a) {
    int64_t group = a.q_heads / a.kv_heads, share = a.batch * a.q_heads * a.q_len / (8 * a.threads);
    int64_t tile_rows = std::max(int64_t(96), std::min(ROWS, share / 96 * 96));
    return std::max(int64_t(1), std::min(a.q_len, tile_rows / group));
}

template <typename E> void run(const Forward& a) {
    int64_t count = positions_of_a_tile(a), tiles = (a.q_len + count - 1) / count, tasks = a.batch * a.kv_heads * tiles;
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Scratch scratch;
        TileRegisters registers;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            // The last tiles see most keys under a causal mask: they come first, so that threads end together.
            int64_t tile = tiles - 1 - task / (a.batch * a.kv_heads), head = task % (a.batch * a.kv_heads);
            Tile t{head / a.kv_heads, head % a.kv_heads, tile * count, std::min(count, a.q_len - tile * count)};
            TileOfRows<E>(a, t, scratch).run();
        }
    }
}

void prefill(const Forward& a) {
    switch (a.type) {
        case Type::float32: return run<float>(a);
        case Type::bfloat16: return run<bfloat16>(a);
        case Type::float16: return run<float16>(a);
        case Type::float64: return run<double>(a);
    }
}

}  // namespace SHARDSUM_ISA
