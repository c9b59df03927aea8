// From q.k products to scores in base 2, masked: what every operation does to a row of a tile.
#pragma once

#include <algorithm>
#include <limits>

#include "arguments.h"
#include "vector.h"

namespace SHARDSUM_ISA {

// The keys [begin, end) of a block of `size` that a row sees.
struct Seen {
    int64_t begin, end;
};

// The keys that some rows see lie in [begin, end); all of them see [all_begin, all_end).
struct Span {
    int64_t begin, end, all_begin, all_end;

    void add(Seen s) {
        all_begin = std::max(all_begin, s.begin), all_end = std::min(all_end, s.end);
        if (s.begin < s.end) begin = std::min(begin, s.begin), end = std::max(end, s.end);
    }
    bool misses(int64_t key, int64_t size) const { return end <= key || key + size <= begin; }
    bool covers(int64_t key, int64_t size) const { return all_begin <= key && key + size <= all_end; }
};

inline Seen seen(const Attention& a, int64_t sequence, int64_t row, int64_t first, int64_t size) {
    int64_t at = sequence * a.bounds_batch + row;
    return {std::max(a.lo[at] - first, int64_t(0)), std::min(a.hi[at] - first, size)};
}

// What q is multiplied by before its products with k.
template <typename T> inline T query_factor(const Attention& a) {
    return T(a.softcap != 0 ? a.scale / a.softcap : a.scale * LOG2_E);
}

// What products are multiplied by, once q has the factor's sign: never 0, for -inf marks what is masked.
template <typename T> inline T product_factor(const Attention& a) {
    return std::max(std::abs(query_factor<T>(a)), std::numeric_limits<T>::min());
}

// From this size on a scaled product is rounded by 1 or more. It must be before the maximum is taken from it, which was
// rounded too: a fused product less its own rounded value is not 0, and the largest weight not 1.
template <typename T> constexpr T LARGE_SCORE = sizeof(T) == 4 ? T(1 << 24) : T(int64_t(1) << 53);

template <typename T> inline bool round_large_scores(T top, int64_t begin, int64_t end, T scale, T* s) {
    if (!(std::abs(top) >= LARGE_SCORE<T>)) return false;
    for (int64_t j = begin; j < end; j += lanes<T>) store_vector(s + j, load(s + j) * scale);
    return true;
}

// Whether a score is the scaled product and nothing else.
inline bool is_plain(const Attention& a) { return a.softcap == 0 && a.alibi_slopes == nullptr; }

// Softcap and ALiBi, of one row's products with the keys [first, first + size); s holds whole vectors.
template <typename T>
inline void finish_scores(const Attention& a, int64_t sequence, int64_t head, int64_t row, int64_t first, int64_t size, T* s) {
    if (a.softcap != 0)
        for (int64_t j = 0; j < size; j += lanes<T>) store_vector(s + j, tanh_of<T>(load(s + j)) * T(a.softcap * LOG2_E));
    if (a.alibi_slopes != nullptr) {
        int64_t diagonal = a.diagonal[sequence * a.diagonal_batch + row];
        for (int64_t j = 0; j < size; j++)
            s[j] -= T(LOG2_E) * T(a.alibi_slopes[head]) * T(std::abs(diagonal - a.keys[first + j]));
    }
}

// The finalizer of splitmix64 (Steele, Lea, Flood 2014, figure 16), as in scores.py.
inline uint64_t mixed(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

constexpr uint64_t HASH_STEP = 0x9E3779B97F4A7C15u;

// The word that all weights of one row begin with.
inline uint64_t dropout_word(const Attention& a, int64_t sequence, int64_t head, int64_t row) {
    uint64_t word = mixed(uint64_t(sequence) + a.seed * HASH_STEP);
    word = mixed(word + uint64_t(a.first_head + head + 1) * HASH_STEP);
    return mixed(word + uint64_t(a.rows[row] + 1) * HASH_STEP);
}

// What dropout multiplies the weight of one key by.
inline double kept(const Attention& a, uint64_t word, int64_t key) {
    uint64_t drawn = mixed(word + uint64_t(a.keys[key] + 1) * HASH_STEP) >> 40;
    return double(drawn) / double(1 << 24) >= a.dropout_p ? 1.0 / (1.0 - a.dropout_p) : 0.0;
}

}  // namespace SHARDSUM_ISA
