// What a compiled library reports about itself; build.py checks it after loading.
#include "amx.h"
#include "threads.h"

#ifndef KERNELS_DIGEST
#define KERNELS_DIGEST ""
#endif

extern "C" {
const char* kernels_digest() { return KERNELS_DIGEST; }

int kernels_lanes() { return LANES; }

// By what products in pairs of bfloat16 are faster than float32, see pairs.h and amx.h; null: by
// nothing. On an Intel Xeon VDPBF16PS took four times as long as a multiply-add, and does twice the
// work.
const char* kernels_multiplies_pairs_by() {
    if (amx_permitted()) return "AMX";
#if MULTIPLIES_PAIRS
    if (!__builtin_cpu_is("intel")) return "AVX512_BF16";
#endif
    return nullptr;
}

// Whether the processor has AMX and Linux does not let this process use it.
int kernels_amx_is_refused() { return HAS_AMX && !amx_permitted(); }

// The number of threads; 0 without OpenMP; -1 if two OpenMP libraries are loaded, so that one
// starts the threads and another numbers them.
int kernels_threads() {
    int level = 0;
#pragma omp parallel num_threads(1)
    level = omp_get_level();
#ifdef _OPENMP
    return level ? omp_get_max_threads() : -1;
#else
    return level;
#endif
}
}
