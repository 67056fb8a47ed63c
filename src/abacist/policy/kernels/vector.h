// Vectors of as many floats as the processor adds at once, and what the kernels do with them.
//
// GCC's and Clang's vector extensions: plain operators, no intrinsics, so the same text serves
// AVX-512, AVX2, SSE and NEON. A product that is added becomes a fused multiply-add.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

static inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

static inline Vec all(float x) { return x - Vec{}; }

// Of what is not a number one or the other: it shows in what is then done with both.
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Each lane and the one `half` lanes away, then half as far, until each holds what all hold
// together: their sum, or the largest.
template <int half = LANES / 2, typename Join>
static inline float fold(Vec x, Join join) {
    IntVec other;
    for (int i = 0; i < LANES; i++) other[i] = i ^ half;
#if defined(__clang__)
    Vec y;
    for (int i = 0; i < LANES; i++) y[i] = x[other[i]];
#else
    const Vec y = __builtin_shuffle(x, other);
#endif
    if constexpr (half > 1)
        return fold<half / 2>(join(x, y), join);
    else
        return join(x, y)[0];
}

static inline float sum(Vec x) {
    return fold(x, [](Vec a, Vec b) { return a + b; });
}

static inline float largest(Vec x) { return fold(x, larger); }

// e to the power of x for x <= 0 (what a softmax asks for), to 2 units in the last place; below
// -87.3 the result is 0. What is not a number stays so.
static inline Vec exponential(Vec x) {
    const Vec least = all(-87.3f);
    const Vec clamped = least > x ? least : x;
    // x = n ln 2 + r: the exponent takes n, a polynomial takes r. Adding 1.5 * 2^23 rounds.
    const Vec magic = all(12582912.0f);
    const Vec shifted = clamped * 1.44269504f + magic;
    const Vec n = shifted - magic;
    const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const IntVec power = ((IntVec)shifted - 0x4B400000 + 127) << 23;
    return least > x ? Vec{} : y * (Vec)power;
}

// 2 to the power of x for x <= 0, to 1 unit in the last place; below -126 the result is 0. What is
// not a number stays so.
static inline Vec power_of_two(Vec x) {
    const Vec least = all(-126.0f);
    const Vec clamped = least > x ? least : x;
    const Vec magic = all(12582912.0f);
    const Vec shifted = clamped + magic;
    const Vec r = clamped - (shifted - magic);
    Vec y = all(1.5453163e-4f);
    y = y * r + 1.3390863e-3f;
    y = y * r + 9.6180830e-3f;
    y = y * r + 5.5503570e-2f;
    y = y * r + 2.4022651e-1f;
    y = y * r + 6.9314718e-1f;
    y = y * r + 1.0f;
    const IntVec power = ((IntVec)shifted - 0x4B400000 + 127) << 23;
    return least > x ? Vec{} : y * (Vec)power;
}
