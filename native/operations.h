// The operations of one instruction set, each in a source of its own.
#pragma once

#include "arguments.h"

namespace SHARDSUM_ISA {

void prefill(const Forward&);

}  // namespace SHARDSUM_ISA
