// Attention of many rows: tiles of rows against blocks of keys, the softmax taken online.
#include "operations.h"
#include "tile.h"

namespace SHARDSUM_ISA {

template <typename E> void run(const Forward& a) {
    int64_t count = positions_of_a_tile<typename PackedOf<E>::type>(a), tiles = (a.q_len + count - 1) / count, tasks = a.batch * a.kv_heads * tiles;
#pragma omp parallel num_threads(a.threads)
    {
        static thread_local Scratch scratch;
        TileRegisters registers;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            // The last tiles see most keys under a causal mask: they come first, so that threads end together.
            int64_t tile = tiles - 1 - task / (a.batch * a.kv_heads), head = task % (a.batch * a.kv_heads);
            Tile t{head / a.kv_heads, head % a.kv_heads, tile * count, std::min(count, a.q_len - tile * count)};
            TileOfRows<E> rows(a, t, scratch);
            rows.attend(0, a.kv_len, [](int64_t, bool) {});
            rows.write();
        }
    }
}

void prefill(const Forward& a) {
    with_element_of(a.type, [&](auto element) { run<decltype(element)>(a); });
}

}  // namespace SHARDSUM_ISA
