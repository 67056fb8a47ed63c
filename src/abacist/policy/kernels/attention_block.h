// A block of rows set against the keys that they see: attention forward and backward.
//
// A row is one query head of one token. Query heads that share a key head are rows of one block,
// so that a key is read once for all of them. The rows of a block lie side by side in the lanes of
// vectors: scores are [keys, rows], and a softmax over the keys needs no sums across lanes. Nothing
// larger than a block's scores is ever held; the backward makes the weights again from each
// row's largest score and the sum of its exponentials.
//
// Scores are in units of ln 2, so that a weight is a power of two.
#pragma once

#include <cmath>

#include "tiles.h"
#include "tree.h"

namespace attention {

struct View {
    const float* at;
    int64_t token, head;  // strides; the numbers of a head lie next to each other
};

struct Attention {
    View query, key, value;  // [tokens, heads, size]; fewer heads of keys and values
    float* out;              // [tokens, heads, size]
    float* largest;          // [key heads, tokens * group]: each row's largest score
    float* share;            // the like: one by the sum of the row's exponentials
    const Branch* branches;
    int64_t branch_count, tokens, heads, key_heads, size;
    float scale;
    int32_t threads;
};

struct Gradients {
    View out;
    float *query, *key, *value;  // [tokens, heads, size], without gaps
};

constexpr int64_t ROWS = WIDE * LANES;  // of a block
constexpr int64_t KEYS = 128;           // whose scores are held at once
constexpr float LN_2 = 0.693147181f;

// What a thread needs to set a block's rows, of one key head, against the keys they see.
class Worker {
  public:
    explicit Worker(const Attention& batch)
        : batch(batch), group(batch.heads / batch.key_heads),
          width((batch.size + LANES - 1) / LANES * LANES), rows(ROWS * width),
          columns(ROWS * width), scores(KEYS * ROWS), result(ROWS * width),
          grad_rows(ROWS * width), grad_columns(ROWS * width), grad_scores(KEYS * ROWS) {}

    template <int vectors>
    void forward(const Block& block, int64_t key_head) {
        take(batch.query, block, key_head, batch.scale / LN_2, rows.at);
        transpose(columns.at, ROWS, rows.at, width, vectors * LANES, width);
        Vec largest[vectors], sums[vectors];
        bool begun = false;
        for_keys(block, [&](int64_t branch, int64_t from, int64_t count) {
            const Scalars keys = scalars(batch.key, key_head, branch, from);
            const Scalars values = scalars(batch.value, key_head, branch, from).transposed();
            product<vectors, false>(scores.at, ROWS, count, keys, columns.at, ROWS, batch.size);
            if (branch == block.branch) hide<vectors>(block, from, count);
            // A row's own first token comes first, so there is always a largest score.
            if (begun) {
                weigh<vectors, true>(count, largest, sums);
                product<vectors, true>(result.at, ROWS, batch.size, values, scores.at, ROWS, count);
            } else {
                weigh<vectors, false>(count, largest, sums);
                product<vectors, false>(result.at, ROWS, batch.size, values, scores.at, ROWS,
                                        count);
            }
            begun = true;
        });
        for (Vec& x : sums) x = 1.0f / x;
        memcpy(batch.largest + place(block, key_head), largest, block.count * sizeof(float));
        memcpy(batch.share + place(block, key_head), sums, block.count * sizeof(float));
        give<vectors>(block, key_head, sums, batch.out);
    }

    // Writes the gradients of the block's queries; adds to those of keys (in units of ln 2) and
    // values, [tokens seen by the part, width] each.
    template <int vectors>
    void backward(const Block& block, const Part& part, int64_t key_head, const Gradients& grad,
                  float* grad_key, float* grad_value) {
        constexpr int64_t count_rows = vectors * LANES;
        Vec largest[vectors] = {}, shares[vectors] = {}, mean[vectors], factors[vectors];
        memcpy(largest, batch.largest + place(block, key_head), block.count * sizeof(float));
        memcpy(shares, batch.share + place(block, key_head), block.count * sizeof(float));
        // Exponentials are not made into weights: the gradients carry the rows' shares instead.
        take(grad.out, block, key_head, 1, grad_rows.at);
        take({batch.out, batch.heads * batch.size, batch.size}, block, key_head, 1, rows.at);
        for (int v = 0; v < vectors; v++) {
            float* const some = grad_rows.at + v * LANES * width;
            mean[v] = shares[v] * dots(rows.at + v * LANES * width, some);
            for (int i = 0; i < LANES; i++)
                for (int64_t d = 0; d < width; d += LANES) {
                    float* const at = some + i * width + d;
                    store(at, load(at) * shares[v][i]);
                }
        }
        take(batch.query, block, key_head, batch.scale / LN_2, rows.at);
        transpose(columns.at, ROWS, rows.at, width, count_rows, width);
        transpose(grad_columns.at, ROWS, grad_rows.at, width, count_rows, width);
        std::fill_n(result.at, ROWS * width, 0.0f);
        for_keys(block, [&](int64_t branch, int64_t from, int64_t count) {
            const Scalars keys = scalars(batch.key, key_head, branch, from);
            const Scalars values = scalars(batch.value, key_head, branch, from);
            product<vectors, false>(scores.at, ROWS, count, keys, columns.at, ROWS, batch.size);
            product<vectors, false>(grad_scores.at, ROWS, count, values, grad_columns.at, ROWS,
                                    batch.size);
            if (branch == block.branch) hide<vectors>(block, from, count);
            for (int64_t at = 0; at < count * ROWS; at += ROWS)
                for (int v = 0; v < vectors; v++) {
                    float* const score = scores.at + at + v * LANES;
                    float* const grad_score = grad_scores.at + at + v * LANES;
                    const Vec weight = power_of_two(load(score) - largest[v]);
                    store(score, weight);
                    store(grad_score, weight * (load(grad_score) - mean[v]));
                }
            const int64_t to = (part.places[branch] + from) * width;
            product_added(grad_value + to, width, count, width, {scores.at, ROWS, 1}, grad_rows.at,
                          width, count_rows);
            product_added(grad_key + to, width, count, width, {grad_scores.at, ROWS, 1}, rows.at,
                          width, count_rows);
            product<vectors, true>(result.at, ROWS, batch.size, keys.transposed(), grad_scores.at,
                                   ROWS, count);
        });
        for (Vec& x : factors) x = all(batch.scale);
        give<vectors>(block, key_head, factors, grad.query);
    }

    const Attention& batch;
    const int64_t group, width;  // query heads of a key head; a head's numbers in whole vectors

  private:
    // Where the block's rows begin among all rows of all key heads.
    int64_t place(const Block& block, int64_t key_head) const {
        return (key_head * batch.tokens + batch.branches[block.branch].start) * group + block.first;
    }

    Scalars scalars(const View& view, int64_t key_head, int64_t branch, int64_t from) const {
        const int64_t token = batch.branches[branch].start + from;
        return {view.at + token * view.token + key_head * view.head, view.token, 1};
    }

    // Calls with (branch, a first token of it, how many) for all that one of the rows sees.
    template <typename Visit>
    void for_keys(const Block& block, Visit visit) const {
        int64_t seen = (block.first + block.count - 1) / group + 1;
        for (int64_t b = block.branch; b >= 0; b = batch.branches[b].parent) {
            if (b != block.branch) seen = batch.branches[b].tokens;
            for (int64_t from = 0; from < seen; from += KEYS)
                visit(b, from, std::min(KEYS, seen - from));
        }
    }

    // Calls with (row, token, head) for each of the block's rows.
    template <typename Visit>
    void for_rows(const Block& block, int64_t key_head, Visit visit) const {
        int64_t token = batch.branches[block.branch].start + block.first / group;
        int64_t member = block.first % group;
        for (int64_t row = 0; row < block.count; row++) {
            visit(row, token, key_head * group + member);
            if (++member == group) member = 0, token++;
        }
    }

    // The block's rows times a factor, to [ROWS, width]; zeros where there are none.
    void take(const View& from, const Block& block, int64_t key_head, float factor, float* to) {
        for_rows(block, key_head, [&](int64_t row, int64_t token, int64_t head) {
            const float* x = from.at + token * from.token + head * from.head;
            float* y = to + row * width;
            int64_t d = 0;
            for (; d + LANES <= batch.size; d += LANES) store(y + d, load(x + d) * factor);
            for (; d < width; d++) y[d] = d < batch.size ? x[d] * factor : 0;
        });
        std::fill(to + block.count * width, to + ROWS * width, 0.0f);
    }

    // The columns of the result, each times its factor, to the rows that they are.
    template <int vectors>
    void give(const Block& block, int64_t key_head, const Vec* factors, float* to) {
        for (int64_t d = 0; d < batch.size; d++)
            for (int v = 0; v < vectors; v++) {
                float* const at = result.at + d * ROWS + v * LANES;
                store(at, load(at) * factors[v]);
            }
        transpose(rows.at, width, result.at, ROWS, width, vectors * LANES);
        for_rows(block, key_head, [&](int64_t row, int64_t token, int64_t head) {
            memcpy(to + (token * batch.heads + head) * batch.size, rows.at + row * width,
                   batch.size * sizeof(float));
        });
    }

    // No weight for keys of the block's own branch that come after a row's token.
    template <int vectors>
    void hide(const Block& block, int64_t from, int64_t count) {
        IntVec last[vectors] = {};  // the last key that each row sees
        for (int r = 0; r < vectors * LANES; r++)
            last[r / LANES][r % LANES] = (block.first + r) / group - from;
        for (int64_t k = std::max<int64_t>(0, block.first / group + 1 - from); k < count; k++)
            for (int v = 0; v < vectors; v++) {
                float* const at = scores.at + k * ROWS + v * LANES;
                store(at, last[v] < static_cast<int32_t>(k) ? all(-INFINITY) : load(at));
            }
    }

    // Scores to exponentials relative to the largest so far; to those, too, what was there before.
    template <int vectors, bool begun>
    void weigh(int64_t count, Vec* largest, Vec* sums) {
        for (int v = 0; v < vectors; v++) {
            float* const column = scores.at + v * LANES;
            Vec top = begun ? largest[v] : all(-INFINITY), sum = {};
            for (int64_t k = 0; k < count; k++) top = larger(top, load(column + k * ROWS));
            for (int64_t k = 0; k < count; k++) {
                const Vec weight = power_of_two(load(column + k * ROWS) - top);
                store(column + k * ROWS, weight);
                sum += weight;
            }
            if (begun) {
                const Vec factor = power_of_two(largest[v] - top);
                sum += sums[v] * factor;
                for (int64_t d = 0; d < batch.size; d++) {
                    float* const at = result.at + d * ROWS + v * LANES;
                    store(at, load(at) * factor);
                }
            }
            sums[v] = sum;
            largest[v] = top;
        }
    }

    // Of LANES rows of a with as many of b.
    Vec dots(const float* a, const float* b) const {
        Vec products[LANES], total = {};
        for (int i = 0; i < LANES; i++) {
            products[i] = Vec{};
            for (int64_t d = 0; d < width; d += LANES)
                products[i] += load(a + i * width + d) * load(b + i * width + d);
        }
        transpose(products);
        for (const Vec& x : products) total += x;
        return total;
    }

    Floats rows, columns, scores, result, grad_rows, grad_columns, grad_scores;
};

}  // namespace attention
