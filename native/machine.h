// Which instruction sets the operations are compiled for, the best first, and whether this machine has them.
#pragma once

#if defined(SHARDSUM_ONLY)  // -DSHARDSUM_ISA=... of CMakeLists.txt: this one alone
#define SHARDSUM_DO(DO, isa) DO(isa)  // the argument of a macro is expanded, but not where that macro makes a string of it
#define SHARDSUM_EACH_ISA(DO) SHARDSUM_DO(DO, SHARDSUM_ONLY)
#elif defined(__x86_64__)
#define SHARDSUM_EACH_ISA(DO) DO(amx) DO(avx512_bf16) DO(avx512) DO(avx2) DO(portable)
#else
#define SHARDSUM_EACH_ISA(DO) DO(portable)
#endif

#if defined(__x86_64__)

#include <sys/syscall.h>
#include <unistd.h>

namespace runs_here {

inline bool portable() { return true; }
inline bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
inline bool avx512() {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
// Every processor with the first has the second.
inline bool avx512_bf16() {
    return avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
// Linux gives a process the tile registers when it asks for them (arch/x86: ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool amx() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace runs_here

#else

namespace runs_here {
inline bool portable() { return true; }
}  // namespace runs_here

#endif
