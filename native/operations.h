// The operations of one instruction set, each in a source of its own.
#pragma once

#include "arguments.h"

namespace SHARDSUM_ISA {

void prefill(const Forward&);
void decode(const Forward&);
void tree(const Forward&);
void backward(const Backward&);
void backward_tree(const Backward&);
void merge(const Merge&);
double read_memory(const float* data, int64_t count, int threads);
double multiply_add(bool of_bfloat16, int64_t rounds, int threads);

}  // namespace SHARDSUM_ISA
