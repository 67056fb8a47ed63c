// Matrices transposed, a square of LANES by LANES at a time.
#pragma once

#include <utility>

#include "vector.h"

// a0 b0 a1 b1 ..., of the lower or upper halves of two vectors.
template <bool upper, int... lane>
static inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((upper * LANES + lane) / 2 + lane % 2 * LANES)...);
#else
    return __builtin_shuffle(a, b, IntVec{((upper * LANES + lane) / 2 + lane % 2 * LANES)...});
#endif
}

// Transposes a square in registers: interleaving its halves log2(LANES) times does it.
static inline void transpose(Vec (&rows)[LANES]) {
    constexpr std::make_integer_sequence<int, LANES> lanes;
    for (int pass = 1; pass < LANES; pass *= 2) {
        Vec mixed[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            mixed[2 * i] = interleave<false>(rows[i], rows[i + LANES / 2], lanes);
            mixed[2 * i + 1] = interleave<true>(rows[i], rows[i + LANES / 2], lanes);
        }
        for (int i = 0; i < LANES; i++) rows[i] = mixed[i];
    }
}

// to [columns, rows] = the transpose of from [rows, columns]; both are multiples of LANES.
template <typename To, typename From>
static inline void transpose(To* to, int64_t to_stride, const From* from, int64_t from_stride,
                             int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            Vec square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load(from + (r + i) * from_stride + c);
            transpose(square);
            for (int i = 0; i < LANES; i++) store(to + (c + i) * to_stride + r, square[i]);
        }
}
