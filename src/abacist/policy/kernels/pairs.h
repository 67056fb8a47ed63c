// Pairs of bfloat16 numbers, which some processors multiply two by two and add to a float at once.
//
// That is twice the work of a float32 multiply-add, on half the bytes. Weights that are bfloat16 lose
// nothing; what they are multiplied with is rounded to bfloat16 first. Sums stay in float32.
//
// A pair holds two consecutive inputs, the first in its lower half. Behind an odd number of inputs
// comes a zero.
#pragma once

#include "tiles.h"

struct Pair {
    uint32_t bits;
};

#if MULTIPLIES_PAIRS

#include <immintrin.h>

static inline Vec multiply_add(Vec total, UIntVec b, Pair a) {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(a.bits));
    return (Vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)b, (__m512bh)all);
}

// Rounds 2 * LANES floats to the nearest, ties to even. NaN stays NaN.
static inline UIntVec rounded(Vec first, Vec second) {
    return (UIntVec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

#else

// The same by plain arithmetic, for tests: no faster than float32, so it is not used unasked.
static inline Vec multiply_add(Vec total, UIntVec b, Pair a) {
    const Bfloat16 first = {static_cast<uint16_t>(a.bits)};
    const Bfloat16 second = {static_cast<uint16_t>(a.bits >> 16)};
    total += (Vec)(b << 16) * widened(first);
    return total + (Vec)(b & 0xFFFF0000u) * widened(second);
}

static inline UIntVec rounded(Vec first, Vec second) {
    const auto upper_half = [](Vec x) {
        const UIntVec bits = (UIntVec)x, odd = bits >> 16 & 1;
        const UIntVec nearest = bits + 0x7FFF + odd;
        return (UIntVec)(x == x ? (Vec)nearest : (Vec)(bits | 0x400000)) >> 16;  // NaN stays NaN
    };
    const UIntVec low = upper_half(first), high = upper_half(second);
    UIntVec pairs;  // of neighbours: of `first` in the lower half of the vector, then of `second`
    for (int i = 0; i < LANES / 2; i++) {
        pairs[i] = low[2 * i] | low[2 * i + 1] << 16;
        pairs[LANES / 2 + i] = high[2 * i] | high[2 * i + 1] << 16;
    }
    return pairs;
}

#endif

static inline UIntVec load(const Pair* from) {
    UIntVec x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(Pair* to, UIntVec x) { memcpy(to, &x, sizeof x); }

static inline int64_t pairs_of(int64_t inputs) { return (inputs + 1) / 2; }

// to [rows, pairs] = x [rows, inputs], rounded; rows of `to` are `stride` pairs apart.
static inline void round_to_pairs(Pair* to, int64_t stride, Scalars x, int64_t rows,
                                  int64_t inputs) {
    constexpr int64_t AT_ONCE = 2 * LANES;
    for (int64_t m = 0; m < rows; m++) {
        const float* const from = x.at + m * x.row;
        for (int64_t k = 0; k < inputs; k += AT_ONCE) {
            const int64_t count = inputs - k < AT_ONCE ? inputs - k : AT_ONCE;
            Pair* const here = to + m * stride + k / 2;
            if (count == AT_ONCE && x.column == 1) {
                store(here, rounded(load(from + k), load(from + k + LANES)));
                continue;
            }
            float some[AT_ONCE] = {};
            for (int64_t i = 0; i < count; i++) some[i] = from[(k + i) * x.column];
            const UIntVec both = rounded(load(some), load(some + LANES));
            memcpy(here, &both, pairs_of(count) * sizeof(Pair));
        }
    }
}
