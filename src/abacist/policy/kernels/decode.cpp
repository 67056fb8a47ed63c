// One token for every row of a decoding batch: the whole network in one call.
//
// Written token by token, a small network is some 350 tiny operations a token, and dispatching them
// costs more than the arithmetic. Here threads walk through all layers without coming back, each
// with its rows or, where weights are large, with its share of the weights.
//
// N rows, H hidden numbers, D numbers of a head, T tokens.

#include <vector>

#include "decode_attention.h"
#include "threads.h"

constexpr int64_t CACHED_BYTES = 4 << 20;

static int64_t bytes_of(const Layer& layer) {
    int64_t total = 0;
    for (const Product* product :
         {&layer.query_key_value, &layer.attention_out, &layer.gated, &layer.down})
        total += product->panels() * PANEL * product->inputs * sizeof(float);
    return total;
}

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

    // Where the weights of a layer lie in the caches, a thread takes its rows through the whole
    // network by itself and waits for nobody: a core that is busy elsewhere would be waited for at
    // every step. Larger weights are shared out, for reading them is what takes the time.
    const bool shares_weights = bytes_of(network.layers[0]) > CACHED_BYTES;

#pragma omp parallel num_threads(threads)
    {
        const int own = omp_get_thread_num(), all_threads = omp_get_num_threads();
        float* const scratch = all_scratch + own * per_thread;
        const Share my_rows(rows, own, all_threads);
        const Share multiplied = shares_weights ? Share(rows, 0, 1) : my_rows;
        const std::vector<Meeting> meetings =
            all_meetings(batch, group, multiplied.first, multiplied.end);
        const auto wait_for_all = [&] {
            if (shares_weights) {
#pragma omp barrier
            }
        };
        const auto norm_rows = [&](const float* weight, float* to) {
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                norm(stream + row * hidden, weight, hidden, network.epsilon, to + row * hidden);
            wait_for_all();
        };
        const auto multiply = [&](const Product& product, const float* x, bool adds, float* y) {
            const Share panels = shares_weights ? Share(product.panels(), own, all_threads)
                                                : Share(product.panels(), 0, 1);
            float* const to = y + multiplied.first * product.outputs;
            product.apply(x + multiplied.first * product.inputs,
                          multiplied.end - multiplied.first, adds ? to : nullptr, to,
                          panels.first, panels.end);
            wait_for_all();
        };

        for (int64_t row = my_rows.first; row < my_rows.end; row++)
            std::copy_n(network.embedding + batch.tokens[row] * hidden, hidden,
                        stream + row * hidden);
        for (int64_t number = 0; number < network.num_layers; number++) {
            const Layer& layer = network.layers[number];
            norm_rows(layer.attention_norm, normed);
            multiply(layer.query_key_value, normed, false, heads);
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                for (int64_t head = 0; head < key_heads; head++)
                    project(network, batch, number, row, head, heads + row * projected,
                            turned + row * query);
            wait_for_all();
            const int64_t pieces = meetings.size() * key_heads;
            const Share my_pieces =
                shares_weights ? Share(pieces, own, all_threads) : Share(pieces, 0, 1);
            for (int64_t piece = my_pieces.first; piece < my_pieces.end; piece++) {
                const Meeting& meeting = meetings[piece / key_heads];
                const int64_t head = piece % key_heads;
                meet(network, batch, number, head, meeting, turned, scratch, all_found, read);
            }
            wait_for_all();
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                for (int64_t head = 0; head < key_heads; head++) {
                    const int64_t first = row * network.query_heads + head * group;
                    read_own(size)(batch.rows.at(network, 0, number, row, head),
                                   batch.rows.at(network, 1, number, row, head),
                                   batch.written[row] + 1, size, group, turned + first * size,
                                   all_found + first, scratch, read + first * size);
                }
            wait_for_all();
            multiply(layer.attention_out, read, true, stream);
            norm_rows(layer.mlp_norm, normed);
            multiply(layer.gated, normed, false, inner);
            multiply(layer.down, inner, true, stream);
        }
        norm_rows(network.final_norm, states);
    }
}

}  // extern "C"
