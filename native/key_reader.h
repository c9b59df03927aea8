// Where decode finds keys and values in memory: in one piece, or in pages.
#pragma once

#include "pack.h"
#include "scores.h"

namespace SHARDSUM_ISA {

// So many keys ahead of its use memory is asked for, into L2: L1 holds no more than the block itself.
constexpr int64_t AHEAD = 64;

// A block of keys of one KV head whose rows lie at one distance, and the keys AHEAD of them.
template <typename E> class BlockInMemory {
public:
    const E *k = nullptr, *v = nullptr;

    BlockInMemory(const Attention& a, int64_t sequence, int64_t kv_head) : a(a), sequence(sequence), kv_head(kv_head) {
        for (int64_t i = 0; i < a.q_len; i++) last = std::max(last, seen(a, sequence, i, 0, a.kv_len).end - 1);
    }

    // So many keys from this one on can be in a block.
    int64_t in_one_piece(int64_t key) const { return a.pages == nullptr ? a.kv_len - key : a.page_len - key % a.page_len; }

    void move_to(int64_t key) {
        const int64_t ahead = std::min(key + AHEAD, last);
        k = find(a.k, key), v = find(a.v, key), k_ahead = find(a.k, ahead), v_ahead = find(a.v, ahead);
        last_ahead = std::min(last - ahead, in_one_piece(ahead) - 1);
        const int64_t further = std::min(key + 2 * AHEAD, last), more = std::min(last - further + 1, in_one_piece(further));
        ask_for_pages(find(a.k, further), std::min(more, AHEAD), a.k.row);
        ask_for_pages(find(a.v, further), std::min(more, AHEAD), a.v.row);
    }

    // Asks for the elements [from, to) of the row that comes AHEAD keys after key i, if the sequence goes so far.
    void ask_for_k(int64_t i, int64_t from, int64_t to) const { ask_for(k_ahead + std::min(i, last_ahead) * a.k.row, from, to); }
    void ask_for_v(int64_t i, int64_t from, int64_t to) const { ask_for(v_ahead + std::min(i, last_ahead) * a.v.row, from, to); }

private:
    const Attention& a;
    const int64_t sequence, kv_head;
    int64_t last = 0, last_ahead = 0;  // `last`: that some row sees
    const E *k_ahead = nullptr, *v_ahead = nullptr;

    const E* find(const Tensor& t, int64_t key) const {
        if (a.pages == nullptr) return row_of<E>(t, sequence, kv_head, key);
        return row_of<E>(t, a.pages[sequence * a.pages_batch + key / a.page_len], kv_head, key % a.page_len);
    }

    static void ask_for(const E* row, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i += 64 / int64_t(sizeof(E))) __builtin_prefetch(row + i, 0, 2);
    }
};

}  // namespace SHARDSUM_ISA
