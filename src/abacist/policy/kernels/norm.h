// RMS normalisation of one row.
#pragma once

#include <cmath>

#include "vector.h"

// What the row is multiplied by: one over the root of the mean square.
static inline float norm_factor(const float* x, int64_t size, float epsilon) {
    Vec squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / size + epsilon);
}

static inline void norm(const float* x, const float* weight, int64_t size, float epsilon,
                        float* y) {
    const float factor = norm_factor(x, size, epsilon);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}
