// What a compiled library reports about itself; build.py checks it after loading.
#include "threads.h"
#include "vector.h"

#ifndef KERNELS_DIGEST
#define KERNELS_DIGEST ""
#endif

extern "C" {
const char* kernels_digest() { return KERNELS_DIGEST; }

int kernels_lanes() { return LANES; }

int kernels_multiplies_pairs() { return MULTIPLIES_PAIRS; }

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
