// What stands between the matrix products of a layer, forward and backward, each in one pass.
//
// T tokens, H numbers of a state, D numbers of a head.

#include <algorithm>
#include <cmath>

#include "norm.h"
#include "products.h"

constexpr int64_t WEIGHED_AT_ONCE = 64 * LANES;

extern "C" {

void norm_forward(const float* x, const float* weight, int64_t rows, int64_t size, float epsilon,
                  float* y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        norm(x + row * size, weight, size, epsilon, y + row * size);
}

// total += the gradient of norm_forward by x. `grad` is its output's.
void norm_backward(const float* grad, const float* x, const float* weight, int64_t rows,
                   int64_t size, float epsilon, float* total, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size, *slope = grad + row * size;
        float* to = total + row * size;
        const float factor = norm_factor(from, size, epsilon);
        Vec products = {};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES)
            products += load(slope + i) * load(weight + i) * load(from + i);
        float along = sum(products);
        for (; i < size; i++) along += slope[i] * weight[i] * from[i];
        const float shrink = along * factor * factor / size;
        for (i = 0; i < size; i++) to[i] += factor * (slope[i] * weight[i] - from[i] * shrink);
    }
}

// x [T, heads, D] turned to its positions, in place; `direction` -1 turns it back.
void turn(float* x, const float* cosines, const float* sines, int64_t tokens, int64_t heads,
          int64_t size, float direction, int threads) {
    const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; token++) {
        const float *cosine = cosines + token * size, *sine = sines + token * size;
        for (int64_t head = 0; head < heads; head++) {
            float* one = x + (token * heads + head) * size;
            for (int64_t i = 0; i < half; i++) {
                const float a = one[i], b = one[i + half];
                one[i] = a * cosine[i] - b * sine[i] * direction;
                one[i + half] = b * cosine[i + half] + a * sine[i + half] * direction;
            }
        }
    }
}

// y = silu(gate) * up
void gate_forward(const float* gates, const float* ups, int64_t count, float* y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        store_some(y + i, gate(load_some(gates + i, left), load_some(ups + i, left)), left);
    }
}

// Each row of logits [rows, count] in its place turned into weights, the largest of them 1; what they
// add up to; the log-probability of the row's target, and the entropy if it is asked for.
void weigh(float* logits, const int64_t* targets, int64_t rows, int64_t count,
           float inverse_temperature, float* totals, float* logps, float* entropies, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float* one = logits + row * count;
        Vec maxima = all(one[0]);
        int64_t whole = 0;
        for (; whole + LANES <= count; whole += LANES) maxima = larger(load(one + whole), maxima);
        float most = largest(maxima);
        for (; whole < count; whole++)
            if (one[whole] > most) most = one[whole];
        const float target = (one[targets[row]] - most) * inverse_temperature;
        // In one float32 sum, what a large vocabulary's many rare tokens add would be rounded away.
        double total = 0, surprise = 0;
        for (int64_t start = 0; start < count; start += WEIGHED_AT_ONCE) {
            Vec some = {}, some_surprise = {};
            for (int64_t i = start; i < std::min(start + WEIGHED_AT_ONCE, count); i += LANES) {
                const int64_t left = count - i;
                Vec shifted = (load_some(one + i, left) - most) * inverse_temperature;
                Vec weight = exponential(shifted);
                if (left < LANES)
                    for (int64_t lane = left; lane < LANES; lane++) weight[lane] = 0.0f;
                store_some(one + i, weight, left);
                some += weight;
                some_surprise += shifted * weight;
            }
            total += sum(some);
            surprise += sum(some_surprise);
        }
        const double log_total = std::log(total);
        totals[row] = total;
        logps[row] = target - log_total;
        if (entropies) entropies[row] = log_total - surprise / total;
    }
}

// The gradients of gate_forward by both, its own being `grad`, where `by_gate` may lie too.
void gate_backward(const float* grad, const float* gates, const float* ups, int64_t count,
                   float* by_gate, float* by_up, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        const Vec slope = load_some(grad + i, left);
        const Vec a = load_some(gates + i, left), b = load_some(ups + i, left);
        const Vec open = sigmoid(a), passed = a * open;
        store_some(by_gate + i, slope * b * open * (a - passed + 1.0f), left);
        store_some(by_up + i, slope * passed, left);
    }
}

}  // extern "C"
