// What the queries of decoding read: the prompt, together with all rows that continue it, and then
// what their own row has written so far. Both parts are joined as one softmax.
#pragma once

#include <numeric>
#include <vector>

#include "network.h"

// Sums over a head's numbers; `fixed` is their count where it is one of the usual ones, else 0.
template <int64_t fixed>
static inline float dot(const float* a, const float* b, int64_t size) {
    Vec products = {};
    for (int64_t i = 0; i < (fixed ? fixed : size); i += LANES) products += load(a + i) * load(b + i);
    return sum(products);
}

// What a row's queries found in its prompt, before what the row itself has written: for each
// query the largest score and the sum of the weights; the weighted values are in `read`.
struct Found {
    float most, total;
};

// A row's queries and its key, of one key head, are normed in place and turned; key and value go
// into the store.
static void project(const Network& network, const Batch& batch, int64_t layer, int64_t row,
                    int64_t head, float* projected, float* turned) {
    const int64_t size = network.head_dim, group = network.query_heads / network.key_heads;
    const int64_t own = batch.written[row], position = batch.prompt_tokens[row] + own;
    const float* cosines = network.cosines + position * size;
    const float* sines = network.sines + position * size;
    const Layer& weights = network.layers[layer];
    const auto to_position = [&](float* x, const float* weight, float scale, float* y) {
        if (weight) norm(x, weight, size, network.epsilon, x);
        turn(x, cosines, sines, size, scale, y);
    };
    for (int64_t query = head * group; query < (head + 1) * group; query++)
        to_position(projected + query * size, weights.query_norm, network.scale,
                    turned + query * size);
    float* const key = projected + (network.query_heads + head) * size;
    const float* const value = key + network.key_heads * size;
    to_position(key, weights.key_norm, 1.0f,
                batch.rows.at(network, 0, layer, row, head) + own * size);
    std::copy_n(value, size, batch.rows.at(network, 1, layer, row, head) + own * size);
}

// As many queries as a vector has lanes, of one key head and one prompt, meet the whole prompt:
// keys [T, D] are the rows of the first product, weights [T, queries] those of the second.
static void read_prompt(const float* keys, const float* values, int64_t tokens, int64_t size,
                        const float* const* queries, int64_t count, float* scratch, Found* found,
                        float* const* reads) {
    float* across = scratch;  // queries as [D, LANES]
    float* scores = across + size * LANES;
    std::fill_n(across, size * LANES, 0.0f);
    for (int64_t query = 0; query < count; query++)
        for (int64_t i = 0; i < size; i++) across[i * LANES + query] = queries[query][i];
    Vec most = all(-INFINITY), total = {};
    in_blocks(tokens, [&](int64_t start, int64_t rows) {
        Sums<1> sums;
        tile_of(rows, keys + start * size, size, 1, size, across, LANES, sums);
        for (int64_t m = 0; m < rows; m++) {
            store(scores + (start + m) * LANES, sums.at[m][0]);
            most = larger(sums.at[m][0], most);
        }
    });
    for (int64_t token = 0; token < tokens; token++) {
        const Vec weight = exponential(load(scores + token * LANES) - most);
        store(scores + token * LANES, weight);
        total += weight;
    }
    for (int64_t query = 0; query < count; query++) found[query] = {most[query], total[query]};
    in_blocks(count, [&](int64_t start, int64_t rows) {
        for (int64_t i = 0; i < size; i += LANES) {
            Sums<1> sums;
            tile_of(rows, scores + start, 1, LANES, tokens, values + i, size, sums);
            for (int64_t m = 0; m < rows; m++) store(reads[start + m] + i, sums.at[m][0]);
        }
    });
}

// The queries of one key head of one row meet what the row has written; both parts are joined.
template <int64_t fixed>
static void read_own(const float* keys, const float* values, int64_t tokens, int64_t size,
                     int64_t group, const float* queries, const Found* found, float* scores,
                     float* read) {
    const int64_t width = (tokens + LANES - 1) / LANES * LANES;
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t g = 0; g < group; g++)
            scores[g * width + token] =
                dot<fixed>(queries + g * size, keys + token * size, size);
    for (int64_t g = 0; g < group; g++) {
        float* one = scores + g * width;
        std::fill(one + tokens, one + width, -INFINITY);
        Vec maxima = all(found[g].most);
        for (int64_t i = 0; i < width; i += LANES) maxima = larger(load(one + i), maxima);
        const float most = largest(maxima);
        Vec totals = {};
        for (int64_t i = 0; i < width; i += LANES) {
            const Vec weight = exponential(load(one + i) - most);
            store(one + i, weight);
            totals += weight;
        }
        const float before = std::exp(found[g].most - most);
        const float inverse = 1.0f / (found[g].total * before + sum(totals));
        for (int64_t i = 0; i < width; i += LANES) store(one + i, load(one + i) * inverse);
        for (int64_t i = 0; i < size; i += LANES)
            store(read + g * size + i, load(read + g * size + i) * (before * inverse));
    }
    in_blocks(group, [&](int64_t start, int64_t rows) {
        for (int64_t i = 0; i < size; i += LANES) {
            Sums<1> sums;
            tile_of(rows, scores + start * width, width, 1, tokens, values + i, size, sums);
            for (int64_t m = 0; m < rows; m++) {
                float* to = read + (start + m) * size + i;
                store(to, load(to) + sums.at[m][0]);
            }
        }
    });
}

static auto read_own(int64_t size) {
    return size == 32    ? read_own<32>
           : size == 64  ? read_own<64>
           : size == 128 ? read_own<128>
                         : read_own<0>;
}

// Queries that meet the same keys in one product: of up to LANES pairs of row and query head.
struct Meeting {
    int64_t place, count;
    int64_t rows[LANES], queries[LANES];  // the query's number within its key head's group
};

// Those of the rows from `first` to `end`.
static std::vector<Meeting> all_meetings(const Batch& batch, int64_t group, int64_t first,
                                         int64_t end) {
    std::vector<int64_t> order(end - first);
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return batch.prompts_of_rows[a] < batch.prompts_of_rows[b];
    });
    std::vector<Meeting> meetings;
    for (const int64_t row : order)
        for (int64_t query = 0; query < group; query++) {
            const int64_t place = batch.prompts_of_rows[row];
            if (meetings.empty() || meetings.back().place != place ||
                meetings.back().count == LANES) {
                meetings.emplace_back();
                meetings.back().place = place;
            }
            Meeting& last = meetings.back();
            last.rows[last.count] = row;
            last.queries[last.count++] = query;
        }
    return meetings;
}

static void meet(const Network& network, const Batch& batch, int64_t layer, int64_t head,
                 const Meeting& meeting, const float* turned, float* scratch, Found* all_found,
                 float* read) {
    const int64_t size = network.head_dim, group = network.query_heads / network.key_heads;
    const float* queries[LANES];
    float* reads[LANES];
    Found found[LANES];
    int64_t numbers[LANES];
    for (int64_t i = 0; i < meeting.count; i++) {
        numbers[i] = meeting.rows[i] * network.query_heads + head * group + meeting.queries[i];
        queries[i] = turned + numbers[i] * size;
        reads[i] = read + numbers[i] * size;
    }
    read_prompt(batch.prompts.at(network, 0, layer, meeting.place, head),
                batch.prompts.at(network, 1, layer, meeting.place, head),
                batch.prompt_tokens[meeting.rows[0]], size, queries, meeting.count, scratch, found,
                reads);
    for (int64_t i = 0; i < meeting.count; i++) all_found[numbers[i]] = found[i];
}
