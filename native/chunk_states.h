// What decode keeps of each chunk of keys until all are merged.
#pragma once

#include "pack.h"
#include "scratch.h"

namespace SHARDSUM_ISA {

// A state for each row and chunk: the weighted sum of values, the weights' sum, and the largest score in base 2.
template <typename T> class States {
public:
    const int64_t width;

    States(const Attention& a, int64_t rows, int64_t chunks, Scratch& scratch)
        : width(padded(a.v_dim, lanes<T>)), rows(rows), memory(scratch.get<T>(chunks * rows * (width + lanes<T>))) {}

    T* sum(int64_t chunk, int64_t row) const { return memory + (chunk * rows + row) * (width + lanes<T>); }
    T& total(int64_t chunk, int64_t row) const { return sum(chunk, row)[width]; }
    T& top(int64_t chunk, int64_t row) const { return sum(chunk, row)[width + 1]; }

private:
    const int64_t rows;
    T* const memory;
};

}  // namespace SHARDSUM_ISA
