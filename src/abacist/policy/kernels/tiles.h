// Matrix products in tiles whose sums stay in registers: the one inner loop of all products here.
//
// A tile is a few rows times a few vectors of columns. For each step along the depth it loads a row
// of `b` as vectors, and multiplies it by one number of `a` per row of the tile:
//
//                        b [depth, vectors * LANES]
//                          | | | |
//     a [rows, depth]  ->  sums [rows, vectors * LANES], in registers
//
// So each number of b that is loaded serves `rows` multiply-adds and each number of a `vectors`.
// The order in which a sum is taken (along the depth, first to last) does not depend on the size of
// its tile. A row therefore has the same result to the bit in any company.
#pragma once

#include "vector.h"

// Registers for sums; the others hold a row of b and a number of a.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUM_REGISTERS = 24;  // of 32
#else
constexpr int SUM_REGISTERS = 12;  // of 16
#endif
constexpr int MAX_VECTORS = 3;

// The most rows of a tile. With one vector there would be registers for more, with no gain.
template <int vectors>
constexpr int TILE_ROWS = SUM_REGISTERS / (vectors == 1 ? 2 : vectors);

// A matrix [rows, columns] that is read one number at a time, with any strides.
template <typename Number>
struct Strided {
    const Number* at;
    int64_t row, column;  // strides

    Strided from_row(int64_t first) const { return {at + first * row, row, column}; }
    Strided transposed() const { return {at, column, row}; }
};

using Scalars = Strided<float>;

static inline Vec multiply_add(Vec total, Vec b, float a) { return total + b * a; }

// sums [rows, vectors * LANES] = (or +=, if `adds`) a [rows, depth] times b [depth, ...]. b holds
// float, or Bfloat16, which is widened as it is loaded; or a and b both hold Pair, see pairs.h.
template <int rows, int vectors, bool adds, typename A, typename B>
__attribute__((always_inline)) static inline void tile(float* sums, int64_t stride, Strided<A> a,
                                                       const B* b, int64_t b_stride,
                                                       int64_t depth) {
    Vec total[rows][vectors];
    // All loops over the tile are unrolled explicitly. Otherwise GCC keeps the sums in memory
    // before and after the loop over the depth, and Clang keeps twelve rows there throughout.
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 12
        for (int v = 0; v < vectors; v++)
            total[m][v] = adds ? load(sums + m * stride + v * LANES) : Vec{};
    for (int64_t k = 0; k < depth; k++) {
        decltype(load(b)) row[vectors];
#pragma GCC unroll 12
        for (int v = 0; v < vectors; v++) row[v] = load(b + k * b_stride + v * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            const A value = a.at[m * a.row + k * a.column];
#pragma GCC unroll 12
            for (int v = 0; v < vectors; v++) total[m][v] = multiply_add(total[m][v], row[v], value);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 12
        for (int v = 0; v < vectors; v++) store(sums + m * stride + v * LANES, total[m][v]);
}

// The same for a number of rows, at most TILE_ROWS, that is known only at run time.
template <int vectors, bool adds, int rows = TILE_ROWS<vectors>, typename A, typename B>
static inline void tile_of(int64_t wanted, float* sums, int64_t stride, Strided<A> a, const B* b,
                           int64_t b_stride, int64_t depth) {
    if (wanted == rows) return tile<rows, vectors, adds>(sums, stride, a, b, b_stride, depth);
    if constexpr (rows > 1)
        tile_of<vectors, adds, rows - 1>(wanted, sums, stride, a, b, b_stride, depth);
}

// Calls body(start, count) for as few blocks of at most `most` rows as possible, all about equal.
template <int most, typename Body>
static inline void in_blocks(int64_t rows, Body body) {
    const int64_t blocks = (rows + most - 1) / most;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * rows / blocks;
        body(start, (block + 1) * rows / blocks - start);
    }
}

// The same product for any number of rows. Not inlined: together with what its callers hold in
// registers, GCC would not keep all sums there.
template <int vectors, bool adds>
__attribute__((noinline)) static void product(float* sums, int64_t stride, int64_t rows, Scalars a,
                                              const float* b, int64_t b_stride, int64_t depth) {
    in_blocks<TILE_ROWS<vectors>>(rows, [&](int64_t start, int64_t count) {
        tile_of<vectors, adds>(count, sums + start * stride, stride, a.from_row(start), b, b_stride,
                               depth);
    });
}

// sums [rows, columns] += a [rows, depth] times b [depth, columns]; columns in whole vectors.
static inline void add_product(float* sums, int64_t stride, int64_t rows, int64_t columns,
                               Scalars a, const float* b, int64_t b_stride, int64_t depth) {
    while (columns > 0) {
        const int64_t vectors = columns / LANES;
        // Four are faster as two and two than as three and one.
        const int64_t taken = vectors == 4 ? 2 : vectors < MAX_VECTORS ? vectors : MAX_VECTORS;
        if (taken == 3) product<3, true>(sums, stride, rows, a, b, b_stride, depth);
        if (taken == 2) product<2, true>(sums, stride, rows, a, b, b_stride, depth);
        if (taken == 1) product<1, true>(sums, stride, rows, a, b, b_stride, depth);
        sums += taken * LANES;
        b += taken * LANES;
        columns -= taken * LANES;
    }
}
