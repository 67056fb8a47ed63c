// The network that writes tokens, the store of its keys and values, and the batch in work.
#pragma once

#include <algorithm>

#include "norm.h"
#include "products.h"

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *mlp_norm;  // Qwen3 norms queries and keys
    Product query_key_value, attention_out, gated, down;
};

struct Network {
    const Layer* layers;
    const float *embedding, *final_norm;
    const float *cosines, *sines;  // [positions, D]; a sine carries the sign of its half
    int64_t num_layers, hidden, query_heads, key_heads, head_dim, inner;
    float epsilon, scale;
};

// Keys and values [2, layers, places, key heads, tokens, D], of which `tokens` are reserved.
struct Store {
    float* start;
    int64_t places, tokens;

    float* at(const Network& network, int kind, int64_t layer, int64_t place, int64_t head) const {
        const int64_t heads = network.key_heads;
        const int64_t row = ((kind * network.num_layers + layer) * places + place) * heads + head;
        return start + row * tokens * network.head_dim;
    }
};

struct Batch {
    Store prompts, rows;
    int64_t count;
    const int64_t *tokens, *prompts_of_rows, *prompt_tokens, *written;  // [N] each
};

// What is left to thread `own` of `threads` when `count` pieces are shared out.
struct Share {
    int64_t first, end;
    Share(int64_t count, int own, int threads)
        : first(own * count / threads), end((own + 1) * count / threads) {}
};

// y = x turned to its position (rotary embedding), times `scale`; x and y apart.
static void turn(const float* x, const float* cosines, const float* sines, int64_t size,
                 float scale, float* y) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        y[i] = (x[i] * cosines[i] + x[i + half] * sines[i]) * scale;
        y[i + half] = (x[i + half] * cosines[i + half] + x[i] * sines[i + half]) * scale;
    }
}
