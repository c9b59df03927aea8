// States of rows in memory, and the two things that are done to them. Compiled in one place (merge.cpp), without fused
// multiply-adds, from operations that IEEE 754 defines: the same states give the same bits whoever merges them, on every
// instruction set.
#pragma once

#include "arguments.h"

namespace SHARDSUM_ISA {

// The sums of rows over some keys: of weighted values, `width` apart; of weights, a vector for each row; and the largest
// score in base 2.
template <typename T> struct Sums {
    T *values, *weights, *top;
    int64_t width;
};

// From sums to states, each `row` elements behind the last: out / total, and lse behind v_dim of these. The sums begin anew.
template <typename T> void close(const Sums<T>& sums, int64_t rows, int64_t v_dim, T* states, int64_t row);

// The states of no keys.
template <typename T> void clear_states(T* states, int64_t rows, int64_t v_dim, int64_t row);

}  // namespace SHARDSUM_ISA
