// What a compiled library says of itself: build.py asks it before it trusts it.
#include "threads.h"
#include "vector.h"

#ifndef KERNELS_DIGEST
#define KERNELS_DIGEST ""
#endif

extern "C" {
const char* kernels_digest() { return KERNELS_DIGEST; }

int kernels_lanes() { return LANES; }

// 0 without OpenMP; -1 if those who start the threads and those who number them are two libraries.
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
