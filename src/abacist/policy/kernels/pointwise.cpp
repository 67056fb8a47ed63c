// Norm, rotary embedding, SwiGLU and softmax for training, forward and backward, in one pass each.
//
// T tokens, C hidden size, D head dim, V vocabulary entries.

#include <algorithm>
#include <cmath>

#include "pointwise.h"

constexpr int64_t LOGITS_AT_ONCE = 64 * LANES;

extern "C" {

void norm_forward(const float* x, const float* weight, int64_t rows, int64_t size, float epsilon,
                  float* y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        norm(x + row * size, weight, size, epsilon, y + row * size);
}

// total [rows, size] += the gradient of norm_forward by x; `grad` is its output's.
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

// The rotary embedding of x [T, heads, D], in place; `direction` -1 is the inverse.
void rotary(float* x, const float* cosines, const float* sines, int64_t tokens, int64_t heads,
            int64_t size, float direction, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            float* const one = x + (token * heads + head) * size;
            rotary(one, cosines + token * size, sines + token * size, size, direction, 1.0f, one);
        }
}

// y = silu(gate) * up
void swiglu_forward(const float* gates, const float* ups, int64_t count, float* y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i;
        store_some(y + i, swiglu(load_some(gates + i, left), load_some(ups + i, left)), left);
    }
}

// Takes the next part of a vocabulary into the softmax of each row: logits [rows, count] of the
// tokens from `first` on. They are replaced by weights relative to the largest logit so far.
//
// `most`, `totals` and `surprises` [rows] hold that logit, the sum of the weights, and the sum of
// their logarithms times the weights; `factors` [rows] becomes what earlier weights have to be
// multiplied with, now that there may be a larger logit. Before the first part the totals are 0.
// `target_logits` is written where the target is in this part.
void softmax_part(float* logits, const int64_t* targets, int64_t first, int64_t rows, int64_t count,
                  float inverse_temperature, float* most_so_far, double* totals, double* surprises,
                  float* factors, float* target_logits, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float* one = logits + row * count;
        Vec maxima = all(one[0]);
        int64_t whole = 0;
        for (; whole + LANES <= count; whole += LANES) maxima = larger(load(one + whole), maxima);
        float most = largest(maxima);
        for (; whole < count; whole++)
            if (one[whole] > most) most = one[whole];
        const int64_t target = targets[row] - first;
        if (target >= 0 && target < count) target_logits[row] = one[target];
        // One float32 sum would round away what the many rare tokens of a large vocabulary add.
        double total = 0, surprise = 0;
        factors[row] = 0;
        if (totals[row] != 0) {  // NaN too
            if (most_so_far[row] > most) most = most_so_far[row];
            const double lower = (most_so_far[row] - most) * inverse_temperature;
            factors[row] = std::exp(lower);
            total = totals[row] * factors[row];
            surprise = (surprises[row] + lower * totals[row]) * factors[row];
        }
        for (int64_t start = 0; start < count; start += LOGITS_AT_ONCE) {
            Vec some = {}, some_surprise = {};
            for (int64_t i = start; i < std::min(start + LOGITS_AT_ONCE, count); i += LANES) {
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
        most_so_far[row] = most;
        totals[row] = total;
        surprises[row] = surprise;
    }
}

// The gradients of swiglu_forward by both; `grad` is its output's. `by_gate` may be `grad`.
void swiglu_backward(const float* grad, const float* gates, const float* ups, int64_t count,
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
