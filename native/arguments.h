// What the operations are told: pointers, sizes and strides, by the names of these fields (kernels/compiled.py). Whoever
// calls has checked them: shardsum.attention, shardsum.decode_paged, or the operators of torch (kernels/operators.py).
#pragma once

#include <cstdint>

// int8: that of keys and values, beside queries in float32, in decode alone.
enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3, int8 = 4 };

// A tensor (batch, heads, length, dim): strides in elements, the last dim's is 1.
struct Tensor {
    const void* data;
    int64_t batch, head, row;
};

// Row i of sequence b sees the keys lo <= j < hi of lo[b * bounds_batch + i]; bounds_batch is 0 for one mask of all.
struct Attention {
    Type type;
    int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_dim;
    Tensor q, k, v;
    Tensor k_scales, v_scales;    // (batch, kv_heads, kv_len) in float32, what a row of int8 is multiplied by
    // Null, or in decode alone: key j of sequence b is row j % page_len of page pages[b * pages_batch + j / page_len] of
    // k and v, which are (pages, kv_heads, page_len, dim). kv_len is that of the longest sequence that has room.
    const int64_t* pages;
    int64_t pages_batch, page_len;
    const int64_t *lo, *hi;
    int64_t bounds_batch;
    double scale;
    double softcap;               // 0: none
    const double* alibi_slopes;   // (q_heads,), or null
    double dropout_p;             // 0: none
    uint64_t seed;
    int64_t first_head;           // dropout counts heads from here
    const int64_t *rows, *keys;   // global indices, for dropout and ALiBi; null without these
    const int64_t* diagonal;      // each row's own position among the keys; diagonal_batch as bounds_batch
    int64_t diagonal_batch;
    int threads;
    int64_t segment;  // 0, or sums go along a tree of segments of so many keys, a multiple of 256
};

// out (batch, q_heads, q_len, v_dim) and lse (batch, q_heads, q_len), contiguous, float or double.
struct Forward : Attention {
    void *out, *lse;
};

// Gradients of q, k and v in the shapes of q, k and v, contiguous, float or double; d_q comes zeroed.
// d_out is contiguous as out is; lse is the final one, delta = sum(d_out * out) - d_lse.
struct Backward : Attention {
    const void *d_out, *lse, *delta;
    void *d_q, *d_k, *d_v;
};

constexpr int64_t LARGEST_DIM = 512;  // head_dim and v_dim

// Two packed states of so many rows, each row's sum of values and then its lse, float or double, and where the merged
// rows' two parts go: to a or b too.
struct Merge {
    Type type;
    const void *a, *b;
    void *out, *lse;
    int64_t rows, width;
    int64_t row, out_row, lse_row;  // rows are so many elements apart
};

// The operations as compiled for one instruction set.
struct Kernels {
    void (*prefill)(const Forward&);  // any number of rows
    void (*decode)(const Forward&);   // the same for few
    void (*tree)(const Forward&);     // any number of rows, whose bits depend on nothing but themselves
    void (*backward)(const Backward&);
    void (*backward_tree)(const Backward&);  // sums of segments along fixed trees
    void (*merge)(const Merge&);
    double (*read_memory)(const float* data, int64_t count, int threads);
    double (*multiply_add)(bool of_bfloat16, int64_t rounds, int threads);
};
