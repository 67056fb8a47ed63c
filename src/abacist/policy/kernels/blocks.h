// Weights in 8 bits: the format MXINT8 of "OCP Microscaling Formats (MX) Specification v1.0" (2023).
//
// A block is 32 neighbours of a row. Each is an integer of 8 bits, the code, and all of them share a
// power of two, whose exponent takes a byte more. A code has at most 7 bits beside its sign, so what
// it stands for is exact in bfloat16: to widen it rounds nothing.
//
// A row of a weight matrix is its codes, and behind them the exponents of its blocks.
#pragma once

#include "pairs.h"
#include "transpose.h"

constexpr int64_t BLOCK = 32;
constexpr int64_t BLOCK_BYTES = BLOCK + 1;
constexpr int EXPONENT_BIAS = 127 + 6;  // 127 of the exponent, 6 for the codes, which are in 64ths

#if defined(__AVX512F__) || defined(__AVX2__)

#include <immintrin.h>

// GCC converts by several instructions what these do by one.
#if defined(__AVX512F__)
#define WIDEN_BYTES(kind, bytes) _mm512_cvtep##kind##_epi32(bytes)
#else
#define WIDEN_BYTES(kind, bytes) _mm256_cvtep##kind##_epi32(bytes)
#endif

static inline __m128i load_bytes(const int8_t* from) {
    __m128i bytes = {};
    memcpy(&bytes, from, LANES);
    return bytes;
}

static inline IntVec load_codes(const int8_t* from) {
    return (IntVec)WIDEN_BYTES(i8, load_bytes(from));
}

static inline IntVec load_exponents(const int8_t* from) {
    return (IntVec)WIDEN_BYTES(u8, load_bytes(from));
}

#undef WIDEN_BYTES

#else

template <typename Byte>
static inline IntVec widened_bytes(const int8_t* from) {
    typedef Byte Bytes __attribute__((vector_size(LANES)));
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, IntVec);
}

static inline IntVec load_codes(const int8_t* from) { return widened_bytes<int8_t>(from); }

static inline IntVec load_exponents(const int8_t* from) { return widened_bytes<uint8_t>(from); }

#endif

static inline Vec load(const int8_t* codes) {
    return __builtin_convertvector(load_codes(codes), Vec);
}

// The powers of two of some exponents, which are above 6 (see mxint8.py).
static inline Vec powers(IntVec exponents) {
    return (Vec)((exponents + (127 - EXPONENT_BIAS)) << 23);
}

static inline float power(uint8_t exponent) { return powers(IntVec{} + exponent)[0]; }

// `count` numbers of one block, or some of them: a multiple of LANES.
static inline void widen(const int8_t* codes, uint8_t exponent, int64_t count, Bfloat16* to) {
    const Vec scale = all(power(exponent));
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(codes + i) * scale);
}

// A matrix [rows, columns] of blocks; columns are a multiple of BLOCK.
struct Blocks {
    const uint8_t* at;
    int64_t row_bytes;

    int64_t columns() const { return row_bytes / BLOCK_BYTES * BLOCK; }

    const int8_t* codes(int64_t row, int64_t column) const {
        return reinterpret_cast<const int8_t*>(at) + row * row_bytes + column;
    }

    uint8_t exponent(int64_t row, int64_t column) const {
        return at[row * row_bytes + columns() + column / BLOCK];
    }

    // `count` numbers of a row, from a column on: whole blocks, or some of one.
    void widen_row(int64_t row, int64_t column, int64_t count, Bfloat16* to) const {
        for (int64_t i = 0; i < count; i += BLOCK)
            widen(codes(row, column + i), exponent(row, column + i), count < BLOCK ? count : BLOCK,
                  to + i);
    }

    // The dot product of a row and x [columns].
    float dot(int64_t row, const float* x) const {
        Vec total = {};
        for (int64_t column = 0; column < columns(); column += BLOCK) {
            const int8_t* const here = codes(row, column);
            Vec of_block = {};
            for (int64_t i = 0; i < BLOCK; i += LANES)
                of_block += load(x + column + i) * load(here + i);
            total += of_block * all(power(exponent(row, column)));
        }
        return sum(total);
    }
};

// A code of a panel (see panels.h) that is multiplied as `Widened`: float, or Pair. Of each block
// of inputs a panel holds the codes [BLOCK, PANEL] and then the exponents [PANEL].
template <typename Widened>
struct Code {
    int8_t bits;
};
