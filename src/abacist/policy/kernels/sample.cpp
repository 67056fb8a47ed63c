// Draw a token for every row from its logits by a number of its own (inverse CDF), in one pass.

#include <algorithm>
#include <vector>

#include "vector.h"

constexpr int64_t CHUNK = 16 * LANES;

// The first token at which the cumulated probability exceeds `luck`, in [0, 1); the last one where
// a logit is not a number, or none is possible.
static int64_t draw(const float* logits, int64_t tokens, float inverse_temperature, double luck,
                    float* weights, double* chunks) {
    const int64_t padded = (tokens + CHUNK - 1) / CHUNK * CHUNK;
    std::copy_n(logits, tokens, weights);
    std::fill(weights + tokens, weights + padded, -__builtin_inff());
    Vec maxima = load(weights);
    for (int64_t i = LANES; i < padded; i += LANES) maxima = larger(load(weights + i), maxima);
    const float most = largest(maxima);
    double total = 0;
    for (int64_t start = 0; start < padded; start += CHUNK) {
        Vec sums = {};
        for (int64_t i = start; i < start + CHUNK; i += LANES) {
            const Vec weight = exponential((load(weights + i) - most) * inverse_temperature);
            store(weights + i, weight);
            sums += weight;
        }
        total += chunks[start / CHUNK] = sum(sums);
    }
    if (!(total > 0)) return tokens - 1;
    double left = luck * total;
    int64_t chunk = 0;
    while (chunk < padded / CHUNK - 1 && left >= chunks[chunk]) left -= chunks[chunk++];
    for (int64_t token = chunk * CHUNK; token < tokens; token++)
        if ((left -= weights[token]) < 0) return token;
    // Rounding carried the search beyond the last token that is possible.
    int64_t last = tokens - 1;
    while (!(weights[last] > 0)) last--;
    return last;
}

extern "C" void sample(const float* logits, const double* luck, int64_t rows, int64_t tokens,
                       float inverse_temperature, int64_t* chosen, int threads) {
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> weights;
        static thread_local std::vector<double> chunks;
        weights.resize(tokens + CHUNK);
        chunks.resize(tokens / CHUNK + 1);
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            chosen[row] = draw(logits + row * tokens, tokens, inverse_temperature, luck[row],
                               weights.data(), chunks.data());
    }
}
