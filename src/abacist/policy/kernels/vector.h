// Vectors of as many floats as the processor adds at once, and the operations on them.
//
// These are GCC's and Clang's vector extensions: plain operators, no intrinsics. So the same source
// serves AVX-512, AVX2, SSE and NEON. A product that is added becomes a fused multiply-add.
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

// Whether it multiplies pairs of bfloat16 numbers, see pairs.h.
#if defined(__AVX512BF16__)
#define MULTIPLIES_PAIRS 1
#else
#define MULTIPLIES_PAIRS 0
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UIntVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));

static inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

// A number as bfloat16: the upper half of a float, so widening it is exact.
struct Bfloat16 {
    uint16_t bits;
};

static inline float widened(Bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline Vec load(const Bfloat16* from) {
    HalfVec halves;
    memcpy(&halves, from, sizeof halves);
    return (Vec)(__builtin_convertvector(halves, UIntVec) << 16);
}

// Exact only for numbers that were bfloat16 before; others lose their lower half.
static inline void store(Bfloat16* to, Vec x) {
    const HalfVec halves = __builtin_convertvector((UIntVec)x >> 16, HalfVec);
    memcpy(to, &halves, sizeof halves);
}

static inline void assign(float& to, float from) { to = from; }
static inline void assign(float& to, Bfloat16 from) { to = widened(from); }
static inline void assign(Bfloat16& to, Bfloat16 from) { to = from; }

// The first `count` floats only; nothing if there are none. The others are zero.
static inline Vec load_some(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
    Vec x = {};
    if (count > 0) memcpy(&x, from, count * sizeof(float));
    return x;
}

static inline void store_some(float* to, Vec x, int64_t count) {
    if (count >= LANES)
        store(to, x);
    else if (count > 0)
        memcpy(to, &x, count * sizeof(float));
}

// x in every lane.
static inline Vec all(float x) { return x - Vec{}; }

// With NaN in a lane the result is either of the two; what is computed from both shows the NaN.
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Joins all lanes by `join`, for example their sum: each lane with the one `half` lanes away, then
// with the one half as far, and so on.
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

// e to the power of x for x <= 0 (as in a softmax), to 2 units in the last place. Below -87.3 the
// result is 0. NaN propagates.
static inline Vec exponential(Vec x) {
    const Vec least = all(-87.3f);
    const Vec clamped = least > x ? least : x;
    // x = n ln 2 + r: n goes into the exponent, e^r is a polynomial. Adding 1.5 * 2^23 rounds to n.
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

// 2 to the power of x for x <= 0, to 1 unit in the last place. Below -126 the result is 0. NaN
// propagates.
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
