// What a compiled library says of itself: build.py asks it before it trusts it.
#include "vector.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef KERNELS_DIGEST
#define KERNELS_DIGEST ""
#endif

extern "C" {
const char* kernels_digest() { return KERNELS_DIGEST; }

int kernels_lanes() { return LANES; }

// 0 without OpenMP.
int kernels_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 0;
#endif
}
}
