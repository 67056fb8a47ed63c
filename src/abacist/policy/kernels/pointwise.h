// Norm, rotary embedding and SwiGLU of one row or vector, for training and decoding alike.
//
// D head dim.
#pragma once

#include <cmath>

#include "vector.h"

// One over the root of the mean square: what RMS normalisation multiplies the row by.
static inline float norm_factor(const float* x, int64_t size, float epsilon) {
    Vec squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / size + epsilon);
}

// y = RMS normalisation of x [size]; y may be x.
static inline void norm(const float* x, const float* weight, int64_t size, float epsilon,
                        float* y) {
    const float factor = norm_factor(x, size, epsilon);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

// y = rotary embedding of one head x [D], times `scale`; y may be x. `cosines` and `sines` [D] are
// those of its position, as transformers makes them. `direction` -1 is the inverse rotation.
static inline void rotary(const float* x, const float* cosines, const float* sines, int64_t size,
                          float direction, float scale, float* y) {
    const int64_t half = size / 2;
    int64_t i = 0;
    // Vectors by hand: where y may be x, compilers do not vectorise the loop below.
    for (; i + LANES <= half; i += LANES) {
        const Vec a = load(x + i), b = load(x + i + half);
        const Vec sine_a = load(sines + i) * direction, sine_b = load(sines + i + half) * direction;
        store(y + i, (a * load(cosines + i) - b * sine_a) * scale);
        store(y + i + half, (b * load(cosines + i + half) + a * sine_b) * scale);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        y[i] = (a * cosines[i] - b * (sines[i] * direction)) * scale;
        y[i + half] = (b * cosines[i + half] + a * (sines[i + half] * direction)) * scale;
    }
}

static inline Vec sigmoid(Vec x) {
    // Of the two forms the one whose exponential cannot overflow.
    const Vec e = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : all(1.0f)) / (e + 1.0f);
}

// silu(gate) * up
static inline Vec swiglu(Vec gate, Vec up) { return gate * sigmoid(gate) * up; }
