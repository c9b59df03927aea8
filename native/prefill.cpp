// Attention of many rows: tiles of rows against blocks of keys, the softmax taken online.
//
// Source: Dao et al. 2022 (FlashAttention, algorithm 1); Goto and van de Geijn 2008 (panels that lie in cache).
#include "matrix.h"
#include "operations.h"
#include "pack.h"
#include "scores.h"
#include "scratch.h"

namespace SHARDSUM_ISA {

constexpr int64_t ROWS = 192, KEYS = 256;  // of a tile and a block

// A tile: all query heads of one KV head, at `count` query positions from `first` on. Row r is head r / count.
struct Tile {
    int64_t sequence, kv_head, first, count;
};

template <typename E, typename T> class TileOfRows {
public:
    TileOfRows(const Forward& a, Tile t, T* memory) : a(a), t(t), group(a.q_heads / a.kv_heads), rows(group * t.count) {
        q = memory;
        scores = q + rows * a.head_dim;
        k = scores + rows * KEYS;
        v = k + KEYS * a.head_dim;
        sum = v + KEYS * v_width();
        top = sum + rows * v_width();
        total = top + rows;
    }

    static int64_t memory(const Forward& a, int64_t count) {
        int64_t rows = a.q_heads / a.kv_heads * count, v_width = padded(a.v_dim, lanes<T>);
        return rows * (a.head_dim + KEYS + v_width + 2) + KEYS * (a.head_dim + v_width);
    }

    void run() {
        for (int64_t g = 0; g < group; g++)
            pack_rows(row_of<E>(a.q, t.sequence, t.kv_head * group + g, t.first), a.q.row, t.count, a.head_dim,
                      query_factor<T>(a), q + g * t.count * a.head_dim, a.head_dim);
        std::fill(sum, sum + rows * v_width(), T(0));
        std::fill(top, top + rows, -INFINITY);
        std::fill(total, total + rows, T(0));
        int64_t begin = a.kv_len, end = 0;
        for (int64_t i = t.first; i < t.first + t.count; i++) {
            Seen s = seen(a, t.sequence, i, 0, a.kv_len);
            if (s.begin < s.end) begin = std::min(begin, s.begin), end = std::max(end, s.end);
        }
        for (int64_t key = begin / KEYS * KEYS; key < end; key += KEYS) block(key, std::min(KEYS, a.kv_len - key));
        write();
    }

private:
    const Forward& a;
    const Tile t;
    const int64_t group, rows;
    T *q, *scores, *k, *v, *sum, *top, *total;

    int64_t v_width() const { return padded(a.v_dim, lanes<T>); }

    void block(int64_t key, int64_t size) {
        int64_t begin = size, end = 0;
        bool full = true;
        for (int64_t i = t.first; i < t.first + t.count; i++) {
            Seen s = seen(a, t.sequence, i, key, size);
            full = full && s.begin == 0 && s.end == size;
            if (s.begin < s.end) begin = std::min(begin, s.begin), end = std::max(end, s.end);
        }
        if (begin >= end) return;
        int64_t width = padded(size, lanes<T>);
        pack_columns(row_of<E>(a.k, t.sequence, t.kv_head, key), a.k.row, size, a.head_dim, k, width);
        pack_rows(row_of<E>(a.v, t.sequence, t.kv_head, key), a.v.row, size, a.v_dim, T(1), v, v_width());
        multiply<T>({q, a.head_dim, 1, k, width, scores, width, rows, width, a.head_dim, false});
        for (int64_t r = 0; r < rows; r++) weigh(r, key, size, width);
        if (full || all_finite(v + begin * v_width(), v_width(), end - begin, v_width())) {
            add_values(0, rows, begin, end, width);
            return;
        }
        // 0 * NaN is NaN: each row multiplies only what it sees.
        for (int64_t r = 0; r < rows; r++) {
            Seen s = seen(a, t.sequence, t.first + r % t.count, key, size);
            if (s.begin < s.end) add_values(r, 1, s.begin, s.end, width);
        }
    }

    void add_values(int64_t row, int64_t count, int64_t begin, int64_t end, int64_t width) {
        multiply<T>({scores + row * width + begin, width, 1, v + begin * v_width(), v_width(), sum + row * v_width(),
                     v_width(), count, v_width(), end - begin, true});
    }

    // From products to weights, under the row's new maximum; what was summed before is scaled down to it.
    void weigh(int64_t r, int64_t key, int64_t size, int64_t width) {
        T* s = scores + r * width;
        int64_t row = t.first + r % t.count, head = t.kv_head * group + r / t.count;
        Seen visible = seen(a, t.sequence, row, key, size);
        if (visible.begin >= visible.end) {
            std::fill(s, s + width, T(0));
            return;
        }
        if (!is_plain(a)) finish_scores(a, t.sequence, head, row, key, size, s);
        std::fill(s, s + visible.begin, -INFINITY);
        std::fill(s + visible.end, s + width, -INFINITY);
        Vector<T> highest = broadcast(T(-INFINITY));
        for (int64_t j = 0; j < width; j += lanes<T>) highest = maximum<T>(load(s + j), highest);
        T before = top[r], now = maximum_of<T>(highest);
        now = before > now || before != before ? before : now;
        if (now == -INFINITY) {
            std::fill(s, s + width, T(0));
            return;
        }
        Vector<T> weights{};
        for (int64_t j = 0; j < width; j += lanes<T>) {
            Vector<T> p = exp2(load(s + j) - now);
            weights += p;
            store_vector(s + j, p);
        }
        T shrunk = exp2(broadcast(before - now))[0];
        top[r] = now;
        total[r] = total[r] * shrunk + sum_of<T>(weights);
        if (shrunk != 1)
            for (int64_t j = 0; j < v_width(); j += lanes<T>) store_vector(sum + r * v_width() + j, load(sum + r * v_width() + j) * shrunk);
        if (a.dropout_p != 0) {
            uint64_t word = dropout_word(a, t.sequence, head, row);
            for (int64_t j = visible.begin; j < visible.end; j++) s[j] *= T(kept(a, word, key + j));
        }
    }

    void write() {
        for (int64_t r = 0; r < rows; r++) {
            int64_t head = t.kv_head * group + r / t.count;
            int64_t at = (t.sequence * a.q_heads + head) * a.q_len + t.first + r % t.count;
            T* out = static_cast<T*>(a.out) + at * a.v_dim;
            bool empty = total[r] == 0;
            for (int64_t j = 0; j < a.v_dim; j++) out[j] = empty ? T(0) : sum[r * v_width() + j] / total[r];
            static_cast<T*>(a.lse)[at] = empty ? -INFINITY : (top[r] + std::log2(total[r])) * T(LN_2);
        }
    }
};

template <typename E, typename T> void run(const Forward& a) {
    int64_t count = std::max(int64_t(1), std::min(a.q_len, ROWS / (a.q_heads / a.kv_heads)));
    int64_t tiles = (a.q_len + count - 1) / count, tasks = a.batch * a.kv_heads * tiles;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t task = 0; task < tasks; task++) {
        static thread_local Scratch scratch;
        // The last tiles see most keys under a causal mask: they come first, so that threads end together.
        int64_t tile = tiles - 1 - task / (a.batch * a.kv_heads), head = task % (a.batch * a.kv_heads);
        Tile t{head / a.kv_heads, head % a.kv_heads, tile * count, std::min(count, a.q_len - tile * count)};
        TileOfRows<E, T>(a, t, scratch.get<T>(TileOfRows<E, T>::memory(a, count))).run();
    }
}

void prefill(const Forward& a) {
    switch (a.type) {
        case Type::float32: return run<float, float>(a);
        case Type::bfloat16: return run<bfloat16, float>(a);
        case Type::float16: return run<float16, float>(a);
        case Type::float64: return run<double, double>(a);
    }
}

}  // namespace SHARDSUM_ISA
