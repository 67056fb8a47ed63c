// Attention of a block of rows to the keys that they see, forward and backward.
//
// A row is one query head of one token. The query heads that share a key head are rows of the same
// block, so that a key is read once for all of them. The rows of a block lie side by side in the
// lanes of vectors: scores are [keys, rows], and a softmax over keys needs no sums across lanes.
//
//     rows of a block (BLOCK_ROWS = 3 vectors) ->
//     keys    score score score ...     computed for BLOCK_KEYS keys at a time; no more scores are
//      |      score score score ...     ever stored
//      v
//
// Forward is an online softmax, as in FlashAttention: when a later group of keys has a larger
// score, what was summed before is rescaled. It stores two numbers per row, the largest score and
// one over the sum of exponentials; from these the backward computes the weights again.
//
// Scores are in units of ln 2, so that a weight is a power of two.
//
// T tokens, H query heads, K key heads, Q = H / K query heads per key head, D head dim.
#pragma once

#include <cmath>

#include "buffer.h"
#include "tiles.h"
#include "transpose.h"
#include "tree.h"

namespace attention {

struct View {
    const float* at;
    int64_t token, head;  // strides; the stride along D is 1
};

struct Attention {
    View query, key, value;  // [T, H, D], [T, K, D], [T, K, D]
    float* out;              // [T, H, D]
    float* largest;          // [K, T * Q]: each row's largest score
    float* inverse_sum;      // [K, T * Q]: one over the sum of the row's exponentials
    const Branch* branches;
    int64_t branch_count, tokens, heads, key_heads, size;  // ..., T, H, K, D
    float scale;
    int32_t threads;
};

struct Gradients {
    View out;
    float *query, *key, *value;  // contiguous
};

constexpr int64_t BLOCK_ROWS = MAX_VECTORS * LANES;
constexpr int64_t BLOCK_KEYS = 128;  // whose scores are stored at a time
constexpr float LN_2 = 0.693147181f;

// Computes blocks, one at a time, for one thread. `vectors` is how many vectors the rows of the
// block fill; a template parameter, so that their sums stay in registers.
class Worker {
  public:
    explicit Worker(const Attention& batch)
        : batch(batch), group(batch.heads / batch.key_heads),
          width((batch.size + LANES - 1) / LANES * LANES), rows(BLOCK_ROWS * width),
          columns(BLOCK_ROWS * width), scores(BLOCK_KEYS * BLOCK_ROWS), result(BLOCK_ROWS * width),
          grad_rows(BLOCK_ROWS * width), grad_columns(BLOCK_ROWS * width),
          grad_scores(BLOCK_KEYS * BLOCK_ROWS) {}

    template <int vectors>
    void forward(const Block& block, int64_t key_head) {
        read_rows(batch.query, block, key_head, batch.scale / LN_2, rows.at);
        transpose(columns.at, BLOCK_ROWS, rows.at, width, vectors * LANES, width);
        Vec largest[vectors], sums[vectors];
        bool begun = false;
        for_keys(block, [&](int64_t branch, int64_t from, int64_t count) {
            const Scalars keys = scalars(batch.key, key_head, branch, from);
            const Scalars values = scalars(batch.value, key_head, branch, from).transposed();
            product<vectors, false>(scores.at, BLOCK_ROWS, count, keys, columns.at, BLOCK_ROWS,
                                    batch.size);
            if (branch == block.branch) mask<vectors>(block, from, count);
            // The own branch comes first and every row sees its first token, so from then on there
            // is a finite largest score.
            if (begun) {
                softmax<vectors, true>(count, largest, sums);
                product<vectors, true>(result.at, BLOCK_ROWS, batch.size, values, scores.at,
                                       BLOCK_ROWS, count);
            } else {
                softmax<vectors, false>(count, largest, sums);
                product<vectors, false>(result.at, BLOCK_ROWS, batch.size, values, scores.at,
                                        BLOCK_ROWS, count);
            }
            begun = true;
        });
        for (Vec& x : sums) x = 1.0f / x;
        memcpy(batch.largest + place(block, key_head), largest, block.count * sizeof(float));
        memcpy(batch.inverse_sum + place(block, key_head), sums, block.count * sizeof(float));
        write_rows<vectors>(block, key_head, sums, batch.out);
    }

    // Writes the gradients of the block's queries, and adds to those of keys (in units of ln 2) and
    // values, each [tokens seen by the part, width].
    //
    // With weights p, gradients of the output g and of the scores ds:
    //     ds = p * (g . value - mean),  mean = g . output
    // and the gradient of a value is the sum of p * g, of a key of ds * query, of a query of
    // ds * key.
    template <int vectors>
    void backward(const Block& block, const Part& part, int64_t key_head, const Gradients& grad,
                  float* grad_key, float* grad_value) {
        constexpr int64_t count_rows = vectors * LANES;
        Vec largest[vectors] = {}, inverse_sums[vectors] = {}, mean[vectors], factors[vectors];
        memcpy(largest, batch.largest + place(block, key_head), block.count * sizeof(float));
        memcpy(inverse_sums, batch.inverse_sum + place(block, key_head),
               block.count * sizeof(float));
        // The exponentials are not normalised. The gradients of the output are multiplied by the
        // inverse sums instead, which is less work.
        read_rows(grad.out, block, key_head, 1, grad_rows.at);
        read_rows({batch.out, batch.heads * batch.size, batch.size}, block, key_head, 1, rows.at);
        for (int v = 0; v < vectors; v++) {
            float* const some = grad_rows.at + v * LANES * width;
            mean[v] = inverse_sums[v] * dots(rows.at + v * LANES * width, some);
            for (int i = 0; i < LANES; i++)
                for (int64_t d = 0; d < width; d += LANES) {
                    float* const at = some + i * width + d;
                    store(at, load(at) * inverse_sums[v][i]);
                }
        }
        read_rows(batch.query, block, key_head, batch.scale / LN_2, rows.at);
        transpose(columns.at, BLOCK_ROWS, rows.at, width, count_rows, width);
        transpose(grad_columns.at, BLOCK_ROWS, grad_rows.at, width, count_rows, width);
        std::fill_n(result.at, BLOCK_ROWS * width, 0.0f);
        for_keys(block, [&](int64_t branch, int64_t from, int64_t count) {
            const Scalars keys = scalars(batch.key, key_head, branch, from);
            const Scalars values = scalars(batch.value, key_head, branch, from);
            product<vectors, false>(scores.at, BLOCK_ROWS, count, keys, columns.at, BLOCK_ROWS,
                                    batch.size);
            product<vectors, false>(grad_scores.at, BLOCK_ROWS, count, values, grad_columns.at,
                                    BLOCK_ROWS, batch.size);
            if (branch == block.branch) mask<vectors>(block, from, count);
            for (int64_t at = 0; at < count * BLOCK_ROWS; at += BLOCK_ROWS)
                for (int v = 0; v < vectors; v++) {
                    float* const score = scores.at + at + v * LANES;
                    float* const grad_score = grad_scores.at + at + v * LANES;
                    const Vec weight = power_of_two(load(score) - largest[v]);
                    store(score, weight);
                    store(grad_score, weight * (load(grad_score) - mean[v]));
                }
            const int64_t to = (part.places[branch] + from) * width;
            add_product(grad_value + to, width, count, width, {scores.at, BLOCK_ROWS, 1},
                        grad_rows.at, width, count_rows);
            add_product(grad_key + to, width, count, width, {grad_scores.at, BLOCK_ROWS, 1},
                        rows.at, width, count_rows);
            product<vectors, true>(result.at, BLOCK_ROWS, batch.size, keys.transposed(),
                                   grad_scores.at, BLOCK_ROWS, count);
        });
        for (Vec& x : factors) x = all(batch.scale);
        write_rows<vectors>(block, key_head, factors, grad.query);
    }

    const Attention& batch;
    const int64_t group, width;  // Q; D in whole vectors

  private:
    // The block's first row among all rows [K, T * Q].
    int64_t place(const Block& block, int64_t key_head) const {
        return (key_head * batch.tokens + batch.branches[block.branch].start) * group + block.first;
    }

    Scalars scalars(const View& view, int64_t key_head, int64_t branch, int64_t from) const {
        const int64_t token = batch.branches[branch].start + from;
        return {view.at + token * view.token + key_head * view.head, view.token, 1};
    }

    // Calls visit(branch, first token in it, number of tokens) for all keys that the block's last
    // row sees: the own branch first, then the branches above.
    template <typename Visit>
    void for_keys(const Block& block, Visit visit) const {
        int64_t seen = (block.first + block.count - 1) / group + 1;
        for (int64_t b = block.branch; b >= 0; b = batch.branches[b].parent) {
            if (b != block.branch) seen = batch.branches[b].tokens;
            for (int64_t from = 0; from < seen; from += BLOCK_KEYS)
                visit(b, from, std::min(BLOCK_KEYS, seen - from));
        }
    }

    // Calls visit(row, token, head) for each of the block's rows.
    template <typename Visit>
    void for_rows(const Block& block, int64_t key_head, Visit visit) const {
        int64_t token = batch.branches[block.branch].start + block.first / group;
        int64_t member = block.first % group;
        for (int64_t row = 0; row < block.count; row++) {
            visit(row, token, key_head * group + member);
            if (++member == group) member = 0, token++;
        }
    }

    // Copies the block's rows times a factor to [BLOCK_ROWS, width], padded with zeros.
    void read_rows(const View& from, const Block& block, int64_t key_head, float factor,
                   float* to) {
        for_rows(block, key_head, [&](int64_t row, int64_t token, int64_t head) {
            const float* x = from.at + token * from.token + head * from.head;
            float* y = to + row * width;
            int64_t d = 0;
            for (; d + LANES <= batch.size; d += LANES) store(y + d, load(x + d) * factor);
            for (; d < width; d++) y[d] = d < batch.size ? x[d] * factor : 0;
        });
        std::fill(to + block.count * width, to + BLOCK_ROWS * width, 0.0f);
    }

    // Writes the columns of `result` [width, BLOCK_ROWS], each times its factor, as rows of `to`.
    template <int vectors>
    void write_rows(const Block& block, int64_t key_head, const Vec* factors, float* to) {
        for (int64_t d = 0; d < batch.size; d++)
            for (int v = 0; v < vectors; v++) {
                float* const at = result.at + d * BLOCK_ROWS + v * LANES;
                store(at, load(at) * factors[v]);
            }
        transpose(rows.at, width, result.at, BLOCK_ROWS, width, vectors * LANES);
        for_rows(block, key_head, [&](int64_t row, int64_t token, int64_t head) {
            memcpy(to + (token * batch.heads + head) * batch.size, rows.at + row * width,
                   batch.size * sizeof(float));
        });
    }

    // Masks the keys of the block's own branch that come after a row's token.
    template <int vectors>
    void mask(const Block& block, int64_t from, int64_t count) {
        IntVec last[vectors] = {};  // the last key that each row sees
        for (int r = 0; r < vectors * LANES; r++)
            last[r / LANES][r % LANES] = (block.first + r) / group - from;
        for (int64_t k = std::max<int64_t>(0, block.first / group + 1 - from); k < count; k++)
            for (int v = 0; v < vectors; v++) {
                float* const at = scores.at + k * BLOCK_ROWS + v * LANES;
                store(at, last[v] < static_cast<int32_t>(k) ? all(-INFINITY) : load(at));
            }
    }

    // Replaces the scores of `count` keys by their exponentials relative to the largest score so
    // far, and, if `begun`, rescales the sums and results of the keys before.
    template <int vectors, bool begun>
    void softmax(int64_t count, Vec* largest, Vec* sums) {
        for (int v = 0; v < vectors; v++) {
            float* const column = scores.at + v * LANES;
            Vec top = begun ? largest[v] : all(-INFINITY), sum = {};
            for (int64_t k = 0; k < count; k++) top = larger(top, load(column + k * BLOCK_ROWS));
            for (int64_t k = 0; k < count; k++) {
                const Vec weight = power_of_two(load(column + k * BLOCK_ROWS) - top);
                store(column + k * BLOCK_ROWS, weight);
                sum += weight;
            }
            if (begun) {
                const Vec factor = power_of_two(largest[v] - top);
                sum += sums[v] * factor;
                for (int64_t d = 0; d < batch.size; d++) {
                    float* const at = result.at + d * BLOCK_ROWS + v * LANES;
                    store(at, load(at) * factor);
                }
            }
            sums[v] = sum;
            largest[v] = top;
        }
    }

    // The dot products of LANES rows of a with LANES rows of b.
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

    Buffer<float> rows, columns, scores, result, grad_rows, grad_columns, grad_scores;
};

}  // namespace attention
