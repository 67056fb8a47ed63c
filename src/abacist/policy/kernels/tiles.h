// Small matrix products whose sums stay in registers.
//
// Both factors are small enough to lie in the caches and come as they are: one is read a number at
// a time, at any strides, the other a vector at a time.
#pragma once

#include <utility>

#include "transpose.h"

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TALL = 8;  // of 32 registers, up to 24 hold sums
#else
constexpr int TALL = 4;
#endif
constexpr int WIDE = 3;  // vectors in a row of a tile, at most

// Something [rows, columns] that is read a number at a time.
struct Scalars {
    const float* at;
    int64_t row, column;  // strides

    Scalars transposed() const { return {at, column, row}; }
};

template <int rows, int vectors, bool adds>
__attribute__((always_inline)) static inline void tile(float* sums, int64_t stride, Scalars a,
                                                       const float* b, int64_t b_stride,
                                                       int64_t depth) {
    Vec total[rows][vectors];
    // Unrolled early, or GCC keeps the sums in memory before and after the loop.
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            total[m][v] = adds ? load(sums + m * stride + v * LANES) : Vec{};
    for (int64_t k = 0; k < depth; k++) {
        Vec row[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) row[v] = load(b + k * b_stride + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const float value = a.at[m * a.row + k * a.column];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) total[m][v] += row[v] * value;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store(sums + m * stride + v * LANES, total[m][v]);
}

// sums [rows, vectors] = (or +=) a [rows, depth] times b [depth, vectors]. By itself in a function:
// together with what its callers hold, GCC would not keep all sums in registers.
template <int vectors, bool adds, int tall = TALL>
__attribute__((noinline)) static void product(float* sums, int64_t stride, int64_t rows, Scalars a,
                                              const float* b, int64_t b_stride, int64_t depth) {
    while (rows >= tall) {
        tile<tall, vectors, adds>(sums, stride, a, b, b_stride, depth);
        sums += tall * stride;
        a.at += tall * a.row;
        rows -= tall;
    }
    if constexpr (tall > 1)
        if (rows) product<vectors, adds, tall / 2>(sums, stride, rows, a, b, b_stride, depth);
}

// sums [rows, columns] += a [rows, depth] times b [depth, columns]; columns in whole vectors.
static inline void product_added(float* sums, int64_t stride, int64_t rows, int64_t columns,
                                 Scalars a, const float* b, int64_t b_stride, int64_t depth) {
    while (columns > 0) {
        const int64_t vectors = columns / LANES;
        // Four are better cut in two and two than in three and one.
        const int64_t taken = vectors == 4 ? 2 : vectors < WIDE ? vectors : WIDE;
        if (taken == 3) product<3, true>(sums, stride, rows, a, b, b_stride, depth);
        if (taken == 2) product<2, true>(sums, stride, rows, a, b, b_stride, depth);
        if (taken == 1) product<1, true>(sums, stride, rows, a, b, b_stride, depth);
        sums += taken * LANES;
        b += taken * LANES;
        columns -= taken * LANES;
    }
}
