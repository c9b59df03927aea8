// Attention whose bits depend on nothing but the row itself and the keys that it sees.
//
// Keys are cut into segments of one size from key 0 on. A row's state over one segment is a leaf; leaves are merged along
// the one binary tree over the segments' numbers: the node of level l and index i covers the segments [i 2^l, (i + 1) 2^l),
// and is its left child where there is no right one. How the tree is cut among tasks, what rows share a tile, and which
// segments of a row are skipped because it sees nothing of them, changes no bit of it: (0, -inf) is merged without effect.
//
// Source: the tree of pairwise summation (Blanchard, Higham, Mary 2020), for the merges of Flash-Decoding (Dao 2023).
#include <vector>

#include "operations.h"
#include "tile.h"

namespace SHARDSUM_ISA {

inline int64_t bits(int64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(uint64_t(x)); }

// States of rows, `row` elements apart: the left's keys come before the right's. `into` may be one of them.
template <typename T>
void merge_states(const T* left, const T* right, T* into, int64_t rows, int64_t v_dim, int64_t row) {
    merge({sizeof(T) == 8 ? Type::float64 : Type::float32, left, right, into, into + v_dim, rows, v_dim + 1, row, row, row});
}

// The states of a strip's rows over the leaves so far, merged as far as the tree allows: nodes of ever fewer levels.
template <typename T> class Branch {
public:
    // A branch in memory: `slots` states of `rows` rows.
    Branch(T* states, int64_t* leaves, int64_t rows, int64_t v_dim, int64_t row)
        : states(states), leaves(leaves), rows(rows), v_dim(v_dim), row(row) {}

    void add(int64_t leaf, const Sums<T>& sums) {
        merge_before(leaf);
        leaves[count] = leaf;
        close(sums, rows, v_dim, state(count++), row);
        merge_before(leaf + 1);
    }

    // The state over all leaves, null if there are none.
    const T* root() {
        while (count > 1) merge_last();
        return count == 0 ? nullptr : states;
    }

private:
    T* states;
    int64_t* leaves;  // one of each state
    int64_t count = 0, rows, v_dim, row;

    T* state(int64_t i) const { return states + i * rows * row; }
    void merge_last() {
        count--;
        merge_states(state(count - 1), state(count), state(count - 1), rows, v_dim, row);
    }
    // Two neighbours are merged when no leaf can come between them and their parent: the highest bit in which leaves
    // differ is the level of the node that joins them.
    void merge_before(int64_t leaf) {
        while (count > 1 && bits(leaves[count - 2] ^ leaves[count - 1]) < bits(leaves[count - 1] ^ leaf)) merge_last();
    }
};

template <typename E> class Tree {
    typedef typename PackedOf<E>::type P;
    typedef Sum<P> T;

public:
    explicit Tree(const Forward& a)
        : a(a), positions(positions_of_a_tile<P>(a)), tiles((a.q_len + positions - 1) / positions),
          all_tiles(a.batch * a.kv_heads * tiles), row(padded(a.v_dim, lanes<T>) + lanes<T>),
          tile_rows(a.q_heads / a.kv_heads * positions) {
        // Subtrees of so many levels that there are eight tasks for each thread: one for each tile if these are enough.
        const int64_t segments = (a.kv_len + a.segment - 1) / a.segment;
        for (levels = bits(segments - 1); levels > 0 && all_tiles * parts < 8 * a.threads; levels--)
            parts = ((segments - 1) >> (levels - 1)) + 1;
        slots = levels + 2;
    }

    void run() {
        static thread_local Scratch of_parts;
        if (parts > 1) nodes = of_parts.get<T>(all_tiles * parts * tile_rows * row);
#pragma omp parallel num_threads(a.threads)
        {
            static thread_local Scratch scratch, of_branches;
            TileRegisters registers;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < all_tiles * parts; task++) make_node(task / parts, task % parts, scratch, of_branches);
#pragma omp for schedule(dynamic)
            for (int64_t tile = 0; tile < all_tiles; tile++)
                if (parts > 1) merge_nodes(tile, scratch);
        }
    }

private:
    const Forward& a;
    const int64_t positions, tiles, all_tiles, row, tile_rows;
    int64_t levels, parts = 1, slots;  // of each part; a tile's parts; states that a strip holds at most
    T* nodes = nullptr;                // of each tile and part

    Tile tile_of(int64_t number) const {
        // The last tiles see most keys under a causal mask: they come first, so that threads end together.
        int64_t tile = tiles - 1 - number / (a.batch * a.kv_heads), head = number % (a.batch * a.kv_heads);
        return {head / a.kv_heads, head % a.kv_heads, tile * positions, std::min(positions, a.q_len - tile * positions)};
    }
    T* node(int64_t tile, int64_t part) const { return nodes + (tile * parts + part) * tile_rows * row; }

    void make_node(int64_t number, int64_t part, Scratch& scratch, Scratch& of_branches) const {
        TileOfRows<E> rows(a, tile_of(number), scratch);
        const int64_t strips = padded(rows.count(), STRIP<P>) / STRIP<P>;
        T* states;
        int64_t* leaves;
        auto place = [&](Places places) {
            places.take(states, strips * slots * STRIP<P> * row);
            places.take(leaves, strips * slots);
            return places.bytes();
        };
        place(Places(of_branches.get<char>(place(Places(nullptr)))));
        std::vector<Branch<T>> branches;
        for (int64_t s = 0; s < strips; s++)
            branches.emplace_back(states + s * slots * STRIP<P> * row, leaves + s * slots, rows.strip_rows(s * STRIP<P>), a.v_dim, row);
        for (int64_t leaf = part << levels; leaf < (part + 1) << levels && leaf * a.segment < a.kv_len; leaf++)
            rows.attend(leaf * a.segment, (leaf + 1) * a.segment, [&](int64_t r, bool last) {
                if (last && rows.sees_some(r, leaf * a.segment, a.segment)) branches[r / STRIP<P>].add(leaf, rows.sums(r));
            });
        for (int64_t r = 0; r < rows.count(); r += STRIP<P>) {
            const T* root = branches[r / STRIP<P>].root();
            if (parts == 1) write(rows, r, root);
            else if (root == nullptr) clear_states(node(number, part) + r * row, rows.strip_rows(r), a.v_dim, row);
            else std::memcpy(node(number, part) + r * row, root, rows.strip_rows(r) * row * sizeof(T));
        }
    }

    // A tile's nodes become its root, along the same tree.
    void merge_nodes(int64_t number, Scratch& scratch) const {
        TileOfRows<E> rows(a, tile_of(number), scratch);
        for (int64_t step = 1; step < parts; step *= 2)
            for (int64_t part = 0; part + step < parts; part += 2 * step)
                merge_states(node(number, part), node(number, part + step), node(number, part), rows.count(), a.v_dim, row);
        for (int64_t r = 0; r < rows.count(); r += STRIP<P>) write(rows, r, node(number, 0) + r * row);
    }

    void write(const TileOfRows<E>& rows, int64_t r, const T* states) const {
        for (int64_t i = 0; i < rows.strip_rows(r); i++) {
            T *out = static_cast<T*>(a.out) + rows.number(r + i) * a.v_dim, *lse = static_cast<T*>(a.lse) + rows.number(r + i);
            if (states == nullptr) std::fill(out, out + a.v_dim, T(0));
            else std::memcpy(out, states + i * row, a.v_dim * sizeof(T));
            *lse = states == nullptr ? -INFINITY : states[i * row + a.v_dim];
        }
    }
};

void tree(const Forward& a) {
    with_element_of(a.type, [&](auto element) { Tree<decltype(element)>(a).run(); });
}

}  // namespace SHARDSUM_ISA
