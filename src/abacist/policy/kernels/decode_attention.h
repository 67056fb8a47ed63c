// Attention of decoding. Each row attends to the prefix that all prompts begin with, then to the
// rest of its prompt, then to its own completion, and the parts are joined into one softmax.
//
// All rows attend to the same keys of the prefix, and all rows of a prompt to the same keys of its
// rest. So these parts are computed for *query tiles*: up to LANES queries of one key head, one per
// lane of a vector. A key or a value is read once per tile instead of once per query. The
// completion differs for each row and is computed row by row, for the query heads that share a key
// head.
//
// The softmax is joined as in FlashAttention: a part leaves, for each query, its largest score m1,
// the sum s1 of exp(score - m1), and the values weighted by exp(score - m1). With m the larger of
// m1 and the largest score of the next part, all that was left is rescaled by exp(m1 - m).
//
// N rows, H query heads, K key heads, Q = H / K query heads per key head, D head dim, T tokens.
#pragma once

#include <numeric>
#include <vector>

#include "decoder.h"

// The dot product of a and b; `fixed` is their size where it is a usual head dim, else 0.
template <int64_t fixed>
static inline float dot(const float* a, const float* b, int64_t size) {
    Vec products = {};
    for (int64_t i = 0; i < (fixed ? fixed : size); i += LANES)
        products += load(a + i) * load(b + i);
    return sum(products);
}

// The softmax of one query over its prompt as far as it was read, not yet normalised.
struct PromptSoftmax {
    float largest, sum;  // largest score; sum of the weights exp(score - largest)
};

// Norms and rotates the queries and the key of one row and key head, and stores key and value.
// `projected` [(H + 2 K) D] is the output of the query-key-value projection; queries go to
// `rotated` [H D], the key and the value into the cache.
static void rotate_and_store(const Network& network, const Batch& batch, int64_t layer, int64_t row,
                             int64_t head, float* projected, float* rotated) {
    const int64_t size = network.head_dim, group = network.query_heads / network.key_heads;
    const int64_t own = batch.written[row], position = batch.prompt_tokens[row] + own;
    const float* cosines = network.cosines + position * size;
    const float* sines = network.sines + position * size;
    const Layer& weights = network.layers[layer];
    const auto to_position = [&](float* x, const float* weight, float scale, float* y) {
        if (weight) norm(x, weight, size, network.epsilon, x);
        rotary(x, cosines, sines, size, 1.0f, scale, y);
    };
    for (int64_t query = head * group; query < (head + 1) * group; query++)
        to_position(projected + query * size, weights.query_norm, network.scale,
                    rotated + query * size);
    float* const key = projected + (network.query_heads + head) * size;
    const float* const value = key + network.key_heads * size;
    to_position(key, weights.key_norm, 1.0f,
                batch.rows.at(network, 0, layer, row, head) + own * size);
    std::copy_n(value, size, batch.rows.at(network, 1, layer, row, head) + own * size);
}

// Attention of `count` queries (at most LANES) to `keys` and `values` [T, D] of prompts. Queries
// lie side by side in the lanes, so that scores are [T, LANES] and a softmax over the tokens needs
// no sums across lanes. Adds to `softmax` [count] and, for each query, the weighted values to its
// `attended` [D], which hold what is known of the tokens before.
static void attend_prompt(const float* keys, const float* values, int64_t tokens, int64_t size,
                          const float* const* queries, int64_t count, float* scratch,
                          PromptSoftmax* softmax, float* const* attended) {
    float* across = scratch;  // the queries transposed, [D, LANES]
    float* scores = across + size * LANES;
    std::fill_n(across, size * LANES, 0.0f);
    for (int64_t query = 0; query < count; query++)
        for (int64_t i = 0; i < size; i++) across[i * LANES + query] = queries[query][i];
    product<1, false>(scores, LANES, tokens, {keys, size, 1}, across, LANES, size);
    Vec before = all(-INFINITY), total = {};
    for (int64_t query = 0; query < count; query++) {
        before[query] = softmax[query].largest;
        total[query] = softmax[query].sum;
    }
    Vec most = before;
    for (int64_t token = 0; token < tokens; token++)
        most = larger(load(scores + token * LANES), most);
    const Vec rescale = exponential(before - most);
    total *= rescale;
    for (int64_t token = 0; token < tokens; token++) {
        const Vec weight = exponential(load(scores + token * LANES) - most);
        store(scores + token * LANES, weight);
        total += weight;
    }
    for (int64_t query = 0; query < count; query++) softmax[query] = {most[query], total[query]};
    // weights [count, T], which are the scores transposed, times values [T, D]
    in_blocks<TILE_ROWS<1>>(count, [&](int64_t start, int64_t rows) {
        for (int64_t i = 0; i < size; i += LANES) {
            alignas(sizeof(Vec)) float sums[TILE_ROWS<1> * LANES];
            tile_of<1, false>(rows, sums, LANES, Scalars{scores + start, 1, LANES}, values + i,
                              size, tokens);
            for (int64_t m = 0; m < rows; m++) {
                float* const to = attended[start + m] + i;
                store(to, load(to) * rescale[start + m] + load(sums + m * LANES));
            }
        }
    });
}

// Attention of the `group` (Q) queries of one row and key head to the row's own `keys` and `values`
// [T, D], joined with what attend_prompt left in `softmax` and `attended` [Q, D].
template <int64_t fixed>
static void attend_own(const float* keys, const float* values, int64_t tokens, int64_t size,
                       int64_t group, const float* queries, const PromptSoftmax* softmax,
                       float* scores, float* attended) {
    const int64_t width = (tokens + LANES - 1) / LANES * LANES;  // scores are [Q, width]
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t g = 0; g < group; g++)
            scores[g * width + token] =
                dot<fixed>(queries + g * size, keys + token * size, size);
    for (int64_t g = 0; g < group; g++) {
        float* one = scores + g * width;
        std::fill(one + tokens, one + width, -INFINITY);
        Vec maxima = all(softmax[g].largest);
        for (int64_t i = 0; i < width; i += LANES) maxima = larger(load(one + i), maxima);
        const float most = largest(maxima);
        Vec totals = {};
        for (int64_t i = 0; i < width; i += LANES) {
            const Vec weight = exponential(load(one + i) - most);
            store(one + i, weight);
            totals += weight;
        }
        const float rescale = std::exp(softmax[g].largest - most);
        const float inverse = 1.0f / (softmax[g].sum * rescale + sum(totals));
        for (int64_t i = 0; i < width; i += LANES) store(one + i, load(one + i) * inverse);
        for (int64_t i = 0; i < size; i += LANES) {
            float* const to = attended + g * size + i;
            store(to, load(to) * (rescale * inverse));
        }
    }
    in_blocks<TILE_ROWS<1>>(group, [&](int64_t start, int64_t rows) {
        for (int64_t i = 0; i < size; i += LANES) {
            alignas(sizeof(Vec)) float sums[TILE_ROWS<1> * LANES];
            tile_of<1, false>(rows, sums, LANES, Scalars{scores + start * width, width, 1},
                              values + i, size, tokens);
            for (int64_t m = 0; m < rows; m++) {
                float* const to = attended + (start + m) * size + i;
                store(to, load(to) + load(sums + m * LANES));
            }
        }
    });
}

static auto attend_own_for(int64_t size) {
    return size == 32    ? attend_own<32>
           : size == 64  ? attend_own<64>
           : size == 128 ? attend_own<128>
                         : attend_own<0>;
}

// Up to LANES queries that attend to the same tokens, those of a prompt from `start` to `end`: pairs
// of a row and one of the Q query heads that share a key head. The same tiles serve every key head.
struct QueryTile {
    int64_t prompt, start, end, count;
    int64_t rows[LANES], queries[LANES];
};

// The tiles of the rows from `first` to `end`: of the prefix, with rows of any prompts, or of what
// follows it, with rows of one prompt each. The prefix is read in place 0; every place holds it.
static std::vector<QueryTile> query_tiles(const Batch& batch, int64_t group, int64_t first,
                                          int64_t end, bool of_prefix) {
    std::vector<int64_t> order(end - first);
    std::iota(order.begin(), order.end(), first);
    const auto prompt_of = [&](int64_t row) {
        return of_prefix ? 0 : batch.prompts_of_rows[row];
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return prompt_of(a) < prompt_of(b); });
    std::vector<QueryTile> tiles;
    for (const int64_t row : order)
        for (int64_t query = 0; query < group; query++) {
            const int64_t prompt = prompt_of(row);
            if (tiles.empty() || tiles.back().prompt != prompt || tiles.back().count == LANES) {
                tiles.emplace_back();
                tiles.back().prompt = prompt;
                tiles.back().start = of_prefix ? 0 : batch.prefix_tokens;
                tiles.back().end = of_prefix ? batch.prefix_tokens : batch.prompt_tokens[row];
            }
            QueryTile& last = tiles.back();
            last.rows[last.count] = row;
            last.queries[last.count++] = query;
        }
    return tiles;
}

// attend_prompt for one tile and key head: `rotated` and `attended` [N, H, D], `softmax` [N, H].
static void attend_tile(const Network& network, const Batch& batch, int64_t layer, int64_t head,
                        const QueryTile& tile, const float* rotated, float* scratch,
                        PromptSoftmax* softmax, float* attended) {
    const int64_t size = network.head_dim, group = network.query_heads / network.key_heads;
    const float* queries[LANES];
    float* results[LANES];
    PromptSoftmax found[LANES];
    int64_t numbers[LANES];  // of the queries among all [N, H]
    for (int64_t i = 0; i < tile.count; i++) {
        numbers[i] = tile.rows[i] * network.query_heads + head * group + tile.queries[i];
        queries[i] = rotated + numbers[i] * size;
        results[i] = attended + numbers[i] * size;
        found[i] = tile.start > 0 ? softmax[numbers[i]] : PromptSoftmax{-INFINITY, 0};
        if (tile.start == 0) std::fill_n(results[i], size, 0.0f);
    }
    const auto from_start = [&](int kind) {
        return batch.prompts.at(network, kind, layer, tile.prompt, head) + tile.start * size;
    };
    attend_prompt(from_start(0), from_start(1), tile.end - tile.start, size, queries, tile.count,
                  scratch, found, results);
    for (int64_t i = 0; i < tile.count; i++) softmax[numbers[i]] = found[i];
}
