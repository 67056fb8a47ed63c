// One token for every row of a decoding batch: the whole network in one call.
//
// Written token by token, a small network is some 350 tiny operations a token, and dispatching them
// costs more than the arithmetic. Here all threads walk through the layers together, each taking
// its share of every part and waiting for the others where the next part needs it all.
//
// N rows, H hidden numbers, D numbers of a head, T tokens.

#include <vector>

#include "reading.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

extern "C" {

int64_t panel_outputs() { return PANEL; }

// Lays weight [outputs, inputs] into the panels of `packed`, of which each takes `width` of its
// outputs from `lane` on; the outputs before it, if any, are `before`.
void pack(const float* weight, int64_t outputs, int64_t inputs, int64_t before, int64_t width,
          int64_t lane, float* packed, int threads) {
    const int64_t first = before / width, end = (before + outputs + width - 1) / width;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = first; panel < end; panel++) {
        const int64_t start = std::max(panel * width, before) - before;
        const int64_t count = std::min((panel + 1) * width - before, outputs) - start;
        lay_out(weight + start * inputs, inputs, 1, count, inputs,
                packed + panel * inputs * PANEL + lane + (before + start) % width);
    }
}

// y [rows, outputs] = x [rows, inputs] times the packed weights, plus the bias, plus `residual`.
void multiply(const Product* product, const float* x, int64_t rows, const float* residual, float* y,
              int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share share(product->panels(), omp_get_thread_num(), omp_get_num_threads());
        product->apply(x, rows, residual, y, share.first, share.end);
    }
}

// The states [N, H] behind the last norm, after each row has read its token; its key and value
// are written into the store of the rows. D must be a multiple of LANES.
void decode(const Network* the_network, const Batch* the_batch, float* states, int threads) {
    const Network& network = *the_network;
    const Batch& batch = *the_batch;
    const int64_t rows = batch.count, hidden = network.hidden, size = network.head_dim;
    const int64_t query = network.query_heads * size, key_heads = network.key_heads;
    const int64_t projected = query + 2 * key_heads * size;
    const int64_t group = network.query_heads / key_heads;
    const std::vector<Meeting> meetings = all_meetings(batch, group);
    int64_t longest_prompt = 0, longest_own = 0;
    for (int64_t row = 0; row < rows; row++) {
        longest_prompt = std::max(longest_prompt, batch.prompt_tokens[row]);
        longest_own = std::max(longest_own, batch.written[row] + 1);
    }
    const int64_t per_thread =
        std::max((size + longest_prompt) * LANES, group * (longest_own + LANES));

    // Kept from call to call: fresh memory costs more than what is done with it.
    static thread_local std::vector<float> memory;
    static thread_local std::vector<Found> found;
    memory.resize(rows * (2 * hidden + projected + 2 * query + network.inner) +
                  threads * per_thread);
    found.resize(rows * network.query_heads);
    Found* const all_found = found.data();
    float* const stream = memory.data();  // the residual stream
    float* const normed = stream + rows * hidden;
    float* const heads = normed + rows * hidden;
    float* const turned = heads + rows * projected;
    float* const read = turned + rows * query;
    float* const inner = read + rows * query;
    float* const all_scratch = inner + rows * network.inner;

#pragma omp parallel num_threads(threads)
    {
        const int own = omp_get_thread_num(), all_threads = omp_get_num_threads();
        float* const scratch = all_scratch + own * per_thread;
        const Share my_rows(rows, own, all_threads);
        const auto norm_rows = [&](const float* weight, float* to) {
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                norm(stream + row * hidden, weight, hidden, network.epsilon, to + row * hidden);
        };
        const auto multiply_share = [&](const Product& product, const float* x,
                                        const float* residual, float* y) {
            const Share share(product.panels(), own, all_threads);
            product.apply(x, rows, residual, y, share.first, share.end);
        };

        for (int64_t row = my_rows.first; row < my_rows.end; row++)
            std::copy_n(network.embedding + batch.tokens[row] * hidden, hidden,
                        stream + row * hidden);
        for (int64_t number = 0; number < network.num_layers; number++) {
            const Layer& layer = network.layers[number];
            norm_rows(layer.attention_norm, normed);
#pragma omp barrier
            multiply_share(layer.query_key_value, normed, nullptr, heads);
#pragma omp barrier
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                for (int64_t head = 0; head < key_heads; head++)
                    project(network, batch, number, row, head, heads + row * projected,
                            turned + row * query);
#pragma omp barrier
            const Share pieces(meetings.size() * key_heads, own, all_threads);
            for (int64_t piece = pieces.first; piece < pieces.end; piece++) {
                const Meeting& meeting = meetings[piece / key_heads];
                const int64_t head = piece % key_heads;
                meet(network, batch, number, head, meeting, turned, scratch, all_found, read);
            }
#pragma omp barrier
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                for (int64_t head = 0; head < key_heads; head++) {
                    const int64_t first = row * network.query_heads + head * group;
                    read_own(size)(batch.rows.at(network, 0, number, row, head),
                                   batch.rows.at(network, 1, number, row, head),
                                   batch.written[row] + 1, size, group, turned + first * size,
                                   all_found + first, scratch, read + first * size);
                }
#pragma omp barrier
            multiply_share(layer.attention_out, read, stream, stream);
#pragma omp barrier
            norm_rows(layer.mlp_norm, normed);
#pragma omp barrier
            multiply_share(layer.gated, normed, nullptr, inner);
#pragma omp barrier
            multiply_share(layer.down, inner, stream, stream);
#pragma omp barrier
        }
        norm_rows(network.final_norm, states);
    }
}

}  // extern "C"
