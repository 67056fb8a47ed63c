// The OpenMP functions in use. Compilers that accept the pragmas but bring no library, as Apple's,
// lack its own header.
#pragma once

#ifdef _OPENMP
extern "C" {
int omp_get_level();
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
}
#else
static inline int omp_get_level() { return 0; }
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif
