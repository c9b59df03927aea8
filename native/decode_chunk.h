// A chunk of keys for the few rows that see it: what decode does between memory and a state.
#pragma once

#include "key_reader.h"
#include "integers.h"
#include "pack.h"
#include "scores.h"
#include "chunk_states.h"
#include "decode_dot.h"

namespace SHARDSUM_ISA {

// Rows that go through the keys together, and keys of a block, whose keys and values lie in L1 or L2.
constexpr int64_t ROWS_AT_ONCE = 4, BLOCK = 64;

template <typename E> class RowsOfChunk {
    typedef decltype(element(E{})) T;
    typedef StepOf<E> Step;
    typedef typename Step::Packed Q;
    typedef typename Step::Sum Sum;
    static constexpr int n = lanes<T>;
    // Queries and weights are rounded to 16-bit integers, and products are of integers.
    static constexpr bool INTEGERS = std::is_same_v<Sum, int32_t>;
    static constexpr int MOST_ROWS = std::min(int(ROWS_AT_ONCE), n / 2);

public:
    RowsOfChunk(const Forward& a, int64_t sequence, int64_t kv_head, Scratch& scratch)
        : a(a), sequence(sequence), kv_head(kv_head), group(a.q_heads / a.kv_heads), rows(group * a.q_len),
          q_width(padded(a.head_dim, Step::SIZE) / (std::is_same_v<Q, Pair> ? 2 : 1)),
          lying(a, sequence, kv_head) {
        place(Places(scratch.get<char>(place(Places(nullptr)))));
        pack_queries();
    }

    // The states of the keys [begin, end) become those of `chunk`.
    void attend(int64_t begin, int64_t end, const States<T>& to, int64_t chunk) {
        states = &to, number = chunk;
        Seen whole{end, begin};
        for (int64_t r = 0; r < rows; r++) {
            Seen s = seen(a, sequence, r % a.q_len, 0, a.kv_len);
            sees[r] = {std::max(s.begin, begin), std::min(s.end, end)};
            if (sees[r].begin < sees[r].end) whole = {std::min(whole.begin, sees[r].begin), std::max(whole.end, sees[r].end)};
            std::fill(to.sum(chunk, r), to.sum(chunk, r) + to.width, T(0));
            to.total(chunk, r) = 0, to.top(chunk, r) = -INFINITY;
        }
        for (int64_t key = whole.begin, size; key < whole.end; key += size)
            block(key, size = std::min({BLOCK, whole.end - key, lying.in_one_piece(key)}));
    }

private:
    const Forward& a;
    const int64_t sequence, kv_head, group, rows, q_width;
    Q* q;
    T *scores, *q_factors;  // what the products of a row of queries are multiplied by
    T* weight_factors;      // the same of a row's weights
    int16_t* weights;
    Seen* sees;
    const States<T>* states = nullptr;
    int64_t number = 0;
    BlockInMemory<E> lying;
    alignas(64) float k_scales[BLOCK] = {}, v_scales[BLOCK] = {};  // of a block of int8

    int64_t place(Places places) {
        places.take(q, rows * q_width);
        places.take(scores, rows * BLOCK);
        places.take(q_factors, rows);
        places.take(weight_factors, rows);
        places.take(weights, INTEGERS ? rows * BLOCK : 0);
        places.take(sees, rows);
        return places.bytes();
    }

    void pack_queries() {
        const int sign = query_factor<T>(a) < 0 ? -1 : 1;
        for (int64_t g = 0; g < group; g++) {
            const auto* from = row_of<QueryOf<E>>(a.q, sequence, kv_head * group + g, 0);
            Q* to = q + g * a.q_len * q_width;
            T* factors = q_factors + g * a.q_len;
            std::fill(factors, factors + a.q_len, T(INTEGERS ? sign : 1));
            if constexpr (INTEGERS)
                for (int64_t i = 0; i < a.q_len; i++)
                    factors[i] *= to_integers(from + i * a.q.row, a.head_dim, reinterpret_cast<int16_t*>(to + i * q_width), 2 * q_width);
            else if constexpr (std::is_same_v<Q, Pair>) pack_rows(from, a.q.row, a.q_len, a.head_dim, sign, to, q_width);
            else pack_rows(from, a.q.row, a.q_len, a.head_dim, T(sign), to, q_width);
        }
    }

    void block(int64_t key, int64_t size) {
        lying.move_to(key);
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            switch (std::min(rows - r, int64_t(MOST_ROWS))) {
                case 4: if constexpr (MOST_ROWS >= 4) products<4>(r, size); break;
                case 3: if constexpr (MOST_ROWS >= 3) products<3>(r, size); break;
                case 2: if constexpr (MOST_ROWS >= 2) products<2>(r, size); break;
                default: products<1>(r, size);
            }
        }
        if constexpr (std::is_same_v<E, int8_t>) {
            take_scales(a.k_scales, key, size, k_scales);
            take_scales(a.v_scales, key, size, v_scales);
        }
        bool all = true;
        for (int64_t r = 0; r < rows; r++) {
            Seen visible{std::max(sees[r].begin - key, int64_t(0)), std::min(sees[r].end - key, size)};
            if (visible.begin < visible.end) weigh(r, key, size, visible);
            all &= visible.begin == 0 && visible.end == size;
            if constexpr (INTEGERS) round_weights(r, visible);
        }
        // An integer times a weight of 0 is 0, whatever the scale.
        if (all || INTEGERS) add_values(size);
        else add_seen_values(key, size);
    }

    void take_scales(const Tensor& of, int64_t key, int64_t size, float* to) const {
        std::memcpy(to, row_of<float>(of, sequence, kv_head, key), size * sizeof(float));
    }

    // The products of ROWS rows and all keys of a block, some keys at a time: each key's elements serve all rows.
    template <int ROWS> void products(int64_t r, int64_t size) {
        constexpr int KEYS = ROWS == 1 ? n : ROWS == 2 ? n / 2 : n / 4;
        const int64_t whole = a.head_dim / Step::SIZE * Step::SIZE;
        for (int64_t j = 0; j < size; j += KEYS) {
            const E* k[KEYS];
            for (int i = 0; i < KEYS; i++) {
                int64_t at = std::min(j + i, size - 1);  // behind the last comes the last again
                k[i] = lying.k + at * a.k.row;
                if (r == 0) lying.ask_for_k(at, 0, a.head_dim);
            }
            Vector<Sum> sum[n];
#pragma GCC unroll 16
            for (int i = 0; i < n; i++) sum[i] = Vector<Sum>{};
            const Q* some = q + r * q_width;
            for (int64_t d = 0; d < whole; d += Step::SIZE, some += n)
                multiply<ROWS, KEYS>([&](int i) { return Step::take(k[i] + d); }, some, sum);
            if (whole < a.head_dim)
                multiply<ROWS, KEYS>([&](int i) { return Step::take_some(k[i] + whole, a.head_dim - whole); }, some, sum);
            T found[n];
            store_vector(found, __builtin_convertvector(sums_of<Sum>(sum), Vector<T>));
            for (int i = 0; i < ROWS; i++) std::memcpy(scores + (r + i) * BLOCK + j, found + i * KEYS, KEYS * sizeof(T));
        }
    }

    template <int ROWS, int KEYS, typename Take>
    __attribute__((always_inline)) void multiply(Take take, const Q* some, Vector<Sum>* sum) const {
#pragma GCC unroll 16
        for (int i = 0; i < KEYS; i++) {
            auto of_key = take(i);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++)
                sum[row * KEYS + i] = multiply_add(of_key, right(some + row * q_width), sum[row * KEYS + i]);
        }
    }

    // A row's products become weights under its new maximum, those of the keys that it sees.
    void weigh(int64_t r, int64_t key, int64_t size, Seen visible) {
        T *s = scores + r * BLOCK, scale = product_factor<T>(a), &top = states->top(number, r);
        const int64_t steps = padded(size, n);
        if constexpr (std::is_same_v<E, int8_t>)
            for (int64_t j = 0; j < steps; j += n) store_vector(s + j, load(s + j) * (load(k_scales + j) * q_factors[r]));
        if (!is_plain(a)) {
            for (int64_t j = 0; j < steps; j += n) store_vector(s + j, load(s + j) * scale);
            finish_scores(a, sequence, kv_head * group + r / a.q_len, r % a.q_len, key, size, s);
            scale = 1;
        }
        std::fill(s, s + visible.begin, -INFINITY);
        std::fill(s + visible.end, s + steps, -INFINITY);
        Vector<T> highest = broadcast(T(-INFINITY));
        for (int64_t j = 0; j < steps; j += n) highest = maximum<T>(load(s + j), highest);
        highest *= scale;
        if (any<T>(highest > top)) raise(r, maximum_of<T>(highest));
        if (round_large_scores(top, 0, steps, scale, s)) scale = 1;
        Vector<T> now = broadcast(top == -INFINITY ? T(0) : top), sums{};
        for (int64_t j = 0; j < steps; j += n) {
            Vector<T> weights = exp2(load(s + j) * scale - now);
            sums += weights;
            if constexpr (std::is_same_v<E, int8_t>) weights *= load(v_scales + j);
            store_vector(s + j, weights);
        }
        states->total(number, r) += sum_of<T>(sums);
        if (a.dropout_p != 0) drop(r, key, visible, s);
    }

    void drop(int64_t r, int64_t key, Seen visible, T* weights) const {
        uint64_t word = dropout_word(a, sequence, kv_head * group + r / a.q_len, r % a.q_len);
        for (int64_t j = visible.begin; j < visible.end; j++) weights[j] *= T(kept(a, word, key + j));
    }

    void round_weights(int64_t r, Seen visible) {
        T* s = scores + r * BLOCK;
        if (visible.begin >= visible.end) visible = {0, 0};
        std::fill(s, s + visible.begin, T(0));
        std::fill(s + visible.end, s + BLOCK, T(0));
        weight_factors[r] = to_integers(s, BLOCK, weights + r * BLOCK, BLOCK);
    }

    // What was summed under a smaller maximum is scaled down.
    void raise(int64_t r, T highest) {
        T& top = states->top(number, r);
        if (top != -INFINITY) {
            T shrunk = exp2(broadcast(top - highest))[0], *sum = states->sum(number, r);
            states->total(number, r) *= shrunk;
            for (int64_t j = 0; j < states->width; j += n) store_vector(sum + j, load(sum + j) * shrunk);
        }
        top = highest;
    }

    void add_values(int64_t size) {
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            switch (std::min(rows - r, int64_t(MOST_ROWS))) {
                case 4: if constexpr (MOST_ROWS >= 4) add_of_rows<4, TILE_VECTORS>(r, size); break;
                case 3: if constexpr (MOST_ROWS >= 3) add_of_rows<3, TILE_VECTORS>(r, size); break;
                case 2: if constexpr (MOST_ROWS >= 2) add_of_rows<2, 2 * TILE_VECTORS>(r, size); break;
                default: add_of_rows<1, 2 * TILE_VECTORS>(r, size);
            }
        }
    }

    template <int ROWS, int VECTORS> void add_of_rows(int64_t r, int64_t size) {
#if defined(__AVX512VNNI__)
        if constexpr (INTEGERS) return add_integers<ROWS>(r, size);
#endif
        add_columns<ROWS, VECTORS>(r, 0, size, 0);
    }

#if defined(__AVX512VNNI__)
    // To the sums of ROWS rows, the values of a block's keys, two keys and COLUMNS at a time.
    template <int ROWS> void add_integers(int64_t r, int64_t size) {
        for (int64_t column = 0; column < a.v_dim; column += COLUMNS) {
            ColumnSums sums[ROWS];
            const int64_t some = a.v_dim - column;
            const E* v = lying.v + column;
            for (int64_t j = 0; j < size; j += 2, v += 2 * a.v.row) {
                if (r == 0) lying.ask_for_v(j, column, column + COLUMNS), lying.ask_for_v(j + 1, column, column + COLUMNS);
                const TwoRows two(v, some, v + a.v.row, j + 1 < size ? some : 0);
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; row++) sums[row].add(two, weights + (r + row) * BLOCK + j);
            }
            for (int row = 0; row < ROWS; row++)
                sums[row].write(weight_factors[r + row], states->sum(number, r + row) + column, states->width - column);
        }
    }
#endif

    // Row by row: a value that a row does not see may be NaN, and 0 * NaN is NaN.
    void add_seen_values(int64_t key, int64_t size) {
        for (int64_t r = 0; r < rows; r++) {
            int64_t begin = std::max(sees[r].begin - key, int64_t(0)), end = std::min(sees[r].end - key, size);
            if (begin < end) add_columns<1, 2 * TILE_VECTORS>(r, begin, end, 0);
        }
    }

    // To the sums of ROWS rows, the values of a block's keys [begin, end), from `column` on: VECTORS at a time, then fewer.
    template <int ROWS, int VECTORS> void add_columns(int64_t r, int64_t begin, int64_t end, int64_t column) {
        for (; column + VECTORS * n <= a.v_dim; column += VECTORS * n)
            add_tile<ROWS, VECTORS>(r, begin, end, column, [](const E* p) { return load(p); });
        if constexpr (VECTORS > 1) add_columns<ROWS, VECTORS / 2>(r, begin, end, column);
        else if (column < a.v_dim)
            add_tile<ROWS, 1>(r, begin, end, column, [&](const E* p) { return load_some(p, int(a.v_dim - column)); });
    }

    template <int ROWS, int VECTORS, typename Take>
    void add_tile(int64_t r, int64_t begin, int64_t end, int64_t column, Take take) {
        Vector<T> sum[ROWS][VECTORS];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) sum[row][i] = Vector<T>{};
        const T* weights = scores + r * BLOCK;
        const E* v = lying.v + begin * a.v.row + column;
        for (int64_t j = begin; j < end; j++, v += a.v.row) {
            if (r == 0) lying.ask_for_v(j, column, column + VECTORS * n);
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) {
                Vector<T> of_key = take(v + i * n);
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; row++) sum[row][i] += of_key * weights[row * BLOCK + j];
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) {
                T* to = states->sum(number, r + row) + column + i * n;
                store_vector(to, load(to) + sum[row][i]);
            }
    }
};

}  // namespace SHARDSUM_ISA
