// The table of one instruction set's operations.
#include "operations.h"

namespace SHARDSUM_ISA {

extern const Kernels kernels{prefill, decode, tree, backward, backward_tree, merge, read_memory, multiply_add};

}  // namespace SHARDSUM_ISA
