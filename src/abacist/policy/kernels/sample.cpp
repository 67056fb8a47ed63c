// Sample a token for every row by inverse CDF at the row's own uniform number, in one pass.

#include <algorithm>

#include "buffer.h"
#include "vector.h"

constexpr int64_t CHUNK = 16 * LANES;

// The first token whose cumulative probability exceeds `uniform`, in [0, 1); the last token if a
// logit is NaN or all are -inf. `weights` [tokens, in whole chunks] and `chunks` (their sums) are
// scratch memory. Sums of chunks are taken in double: in float32 a cumulative sum over a large
// vocabulary would not grow at rare tokens.
static int64_t sample_one(const float* logits, int64_t tokens, float inverse_temperature,
                          double uniform, float* weights, double* chunks) {
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
    double left = uniform * total;
    int64_t chunk = 0;
    while (chunk < padded / CHUNK - 1 && left >= chunks[chunk]) left -= chunks[chunk++];
    for (int64_t token = chunk * CHUNK; token < tokens; token++)
        if ((left -= weights[token]) < 0) return token;
    // By rounding, the search went past the last possible token.
    int64_t last = tokens - 1;
    while (!(weights[last] > 0)) last--;
    return last;
}

extern "C" void sample(const float* logits, const double* uniforms, int64_t rows, int64_t tokens,
                       float inverse_temperature, int64_t* chosen, int threads) {
#pragma omp parallel num_threads(threads)
    {
        static thread_local Buffer<float> weights;
        static thread_local Buffer<double> chunks;
        weights.reserve(tokens + CHUNK);
        chunks.reserve(tokens / CHUNK + 1);
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            chosen[row] = sample_one(logits + row * tokens, tokens, inverse_temperature,
                                     uniforms[row], weights.at, chunks.at);
    }
}
