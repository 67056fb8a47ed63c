// The network that decodes, its keys and values, and the batch in work.
//
// N rows, L layers, C hidden size, H query heads, K key heads, D head dim, T tokens. The structures
// must match those in decode.py field by field.
#pragma once

#include <algorithm>

#include "panels.h"

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *mlp_norm;  // Qwen3 norms queries and keys
    Product query_key_value, attention_out, swiglu, down;
};

struct Network {
    const Layer* layers;
    const void* embedding;  // [V, C] of float, or of Bfloat16
    const float* final_norm;
    const float *cosines, *sines;  // [positions, D]
    int64_t num_layers, hidden, query_heads, key_heads, head_dim, inner;
    float epsilon, scale;
    bool bfloat16;

    void embed(int64_t token, float* to) const {
        const auto copy = [&](const auto* rows) {
            for (int64_t i = 0; i < hidden; i++) assign(to[i], rows[token * hidden + i]);
        };
        if (bfloat16)
            copy(static_cast<const Bfloat16*>(embedding));
        else
            copy(static_cast<const float*>(embedding));
    }
};

// Keys and values [2, L, places, K, T, D]. T counts the tokens there is memory for.
struct KeysValues {
    float* start;
    int64_t places, tokens;

    // [T, D] of one head; `kind` 0: keys, 1: values.
    float* at(const Network& network, int kind, int64_t layer, int64_t place, int64_t head) const {
        const int64_t heads = network.key_heads;
        const int64_t row = ((kind * network.num_layers + layer) * places + place) * heads + head;
        return start + row * tokens * network.head_dim;
    }
};

struct Batch {
    KeysValues prompts, rows;
    int64_t prefix_tokens;  // what all prompts begin with; each place in `prompts` holds it
    int64_t count;                                                      // N
    const int64_t *tokens, *prompts_of_rows, *prompt_tokens, *written;  // [N] each
};

// The part of `count` pieces of work that thread `own` of `threads` does.
struct Share {
    int64_t first, end;
    Share(int64_t count, int own, int threads)
        : first(own * count / threads), end((own + 1) * count / threads) {}
};
