// One token for every row of a decoding batch: the whole network in one call.
//
// A token of a small network is about 350 tiny operations, and dispatching them from Python costs
// more than the arithmetic. Here the threads go through all layers in one parallel region, each
// with its share of the rows or, if the weights are large, with its share of the weights.
//
// N rows, L layers, C hidden size, H query heads, K key heads, Q = H / K, D head dim, I inner size
// of the MLP.

#include <vector>

#include "decode_attention.h"
#include "threads.h"

constexpr int64_t CACHED_BYTES = 4 << 20;  // a layer of at most this size stays in the caches

static int64_t bytes_of(const Layer& layer) {
    return layer.query_key_value.bytes() + layer.attention_out.bytes() + layer.swiglu.bytes() +
           layer.down.bytes();
}

static int64_t most_ranks(const Network& network) {
    int64_t most = 0;
    for (int64_t number = 0; number < network.num_layers; number++) {
        const Layer& layer = network.layers[number];
        most = std::max({most, layer.query_key_value.ranks, layer.attention_out.ranks,
                         layer.swiglu.ranks, layer.down.ranks});
    }
    return most;
}

// Packs the outputs of a weight into panels of `width`, behind `before` others: calls lay_out(start,
// count, to) for the outputs of each panel.
template <typename Packed, typename LayOut>
static void pack(int64_t outputs, int64_t inputs, int64_t before, int64_t width, int64_t lane,
                 void* packed, int threads, LayOut lay_out) {
    const int64_t first = before / width, end = (before + outputs + width - 1) / width;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = first; panel < end; panel++) {
        const int64_t start = std::max(panel * width, before) - before;
        const int64_t count = std::min((panel + 1) * width - before, outputs) - start;
        lay_out(start, count,
                static_cast<Packed*>(packed) + panel * panel_size<Packed>(inputs) + lane +
                    (before + start) % width);
    }
}

extern "C" {

int64_t panel_outputs() { return PANEL; }

// Packs weight [outputs, inputs] into the panels of `packed`, behind `before` outputs of other
// weights. Each panel takes `width` outputs, from lane `lane` on. Both hold float, Bfloat16 or
// blocks by `format`, 0 to 2; of Bfloat16, panels may hold pairs.
void pack(const void* weight, int64_t outputs, int64_t inputs, int64_t before, int64_t width,
          int64_t lane, void* packed, int64_t format, int64_t in_pairs, int threads) {
    const auto packed_as = [&](auto number, auto lay_out) {
        pack<decltype(number)>(outputs, inputs, before, width, lane, packed, threads, lay_out);
    };
    const auto plain_as = [&](auto number, const auto* from) {
        packed_as(number, [=](int64_t start, int64_t count, auto* to) {
            lay_out(from + start * inputs, inputs, 1, count, inputs, to);
        });
    };
    if (format == 2) {
        const Blocks blocks = {static_cast<const uint8_t*>(weight), inputs / BLOCK * BLOCK_BYTES};
        packed_as(Code<float>{}, [=](int64_t start, int64_t count, Code<float>* to) {
            lay_out_codes(blocks, start, count, &to->bits);
        });
    } else if (format == 1 && in_pairs) {
        plain_as(Pair{}, static_cast<const Bfloat16*>(weight));
    } else if (format == 1) {
        plain_as(Bfloat16{}, static_cast<const Bfloat16*>(weight));
    } else {
        plain_as(float{}, static_cast<const float*>(weight));
    }
}

// y [rows, outputs] = x [rows, inputs] times the packed weights, plus the bias, plus `residual`.
void multiply(const Product* product, const float* x, int64_t rows, const float* residual, float* y,
              int threads) {
    const Product inner = product->inner_product();
    const Buffer<float> inner_x(rows * product->ranks);
#pragma omp parallel num_threads(threads)
    {
        const int own = omp_get_thread_num(), all = omp_get_num_threads();
        if (product->ranks > 0) {
            const Share share(inner.panels(), own, all);
            inner.apply(x, rows, nullptr, nullptr, inner_x.at, share.first, share.end);
#pragma omp barrier
        }
        const Share share(product->panels(), own, all);
        product->apply(x, rows, inner_x.at, residual, y, share.first, share.end);
    }
}

// Lets each row read its token: writes the hidden states [N, C] after the last norm, and stores the
// token's keys and values. D must be a multiple of LANES.
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
    // Of attend_prompt: queries [D, LANES] and scores [T, LANES]; of attend_own: scores [Q, T].
    const int64_t per_thread =
        std::max((size + longest_prompt) * LANES, group * (longest_own + LANES));

    static thread_local Buffer<float> memory;
    static thread_local Buffer<PromptSoftmax> softmax_memory;
    const int64_t ranks = most_ranks(network);
    memory.reserve(rows * (2 * hidden + projected + 2 * query + network.inner + ranks) +
                   threads * per_thread);
    softmax_memory.reserve(rows * network.query_heads);
    PromptSoftmax* const softmax = softmax_memory.at;  // [N, H]
    float* const stream = memory.at;                   // the residual stream [N, C]
    float* const normed = stream + rows * hidden;      // [N, C]
    float* const heads = normed + rows * hidden;       // queries, keys, values [N, H + 2 K, D]
    float* const rotated = heads + rows * projected;   // queries [N, H, D]
    float* const attended = rotated + rows * query;    // [N, H, D]
    float* const inner = attended + rows * query;      // [N, I]
    float* const lora = inner + rows * network.inner;  // what LoRA's A makes of an input
    float* const all_scratch = lora + rows * ranks;

    // If the weights of a layer stay in the caches, each thread takes its rows through the whole
    // network alone. Threads that wait for each other would wait for any core that is busy
    // elsewhere, at every operation. Larger weights are divided among the threads instead, because
    // reading them is what takes the time; then all threads meet after every operation.
    const bool shares_weights = bytes_of(network.layers[0]) > CACHED_BYTES;

#pragma omp parallel num_threads(threads)
    {
        const int own = omp_get_thread_num(), all_threads = omp_get_num_threads();
        float* const scratch = all_scratch + own * per_thread;
        const Share my_rows(rows, own, all_threads);
        const Share multiplied = shares_weights ? Share(rows, 0, 1) : my_rows;
        const auto tiles_of = [&](bool of_prefix) {
            return query_tiles(batch, group, multiplied.first, multiplied.end, of_prefix);
        };
        // One pass after the other, because each joins what the one before left.
        std::vector<std::vector<QueryTile>> passes;
        if (batch.prefix_tokens > 0) passes.push_back(tiles_of(true));
        passes.push_back(tiles_of(false));
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
            const auto my_panels = [&](const Product& one) {
                return shares_weights ? Share(one.panels(), own, all_threads)
                                      : Share(one.panels(), 0, 1);
            };
            const int64_t count = multiplied.end - multiplied.first;
            const float* const from = x + multiplied.first * product.inputs;
            // The rows of a thread begin at one place for all products: others may be at another.
            float* const inner_x = lora + multiplied.first * ranks;
            float* const to = y + multiplied.first * product.outputs;
            if (product.ranks > 0) {
                const Product one = product.inner_product();
                const Share panels = my_panels(one);
                one.apply(from, count, nullptr, nullptr, inner_x, panels.first, panels.end);
                wait_for_all();
            }
            const Share panels = my_panels(product);
            product.apply(from, count, inner_x, adds ? to : nullptr, to, panels.first, panels.end);
            wait_for_all();
        };

        for (int64_t row = my_rows.first; row < my_rows.end; row++)
            network.embed(batch.tokens[row], stream + row * hidden);
        for (int64_t number = 0; number < network.num_layers; number++) {
            const Layer& layer = network.layers[number];
            norm_rows(layer.attention_norm, normed);
            multiply(layer.query_key_value, normed, false, heads);
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                for (int64_t head = 0; head < key_heads; head++)
                    rotate_and_store(network, batch, number, row, head, heads + row * projected,
                                     rotated + row * query);
            wait_for_all();
            for (const std::vector<QueryTile>& tiles : passes) {
                const int64_t pieces = tiles.size() * key_heads;
                const Share my_pieces =
                    shares_weights ? Share(pieces, own, all_threads) : Share(pieces, 0, 1);
                for (int64_t piece = my_pieces.first; piece < my_pieces.end; piece++)
                    attend_tile(network, batch, number, piece % key_heads,
                                tiles[piece / key_heads], rotated, scratch, softmax, attended);
                wait_for_all();
            }
            for (int64_t row = my_rows.first; row < my_rows.end; row++)
                for (int64_t head = 0; head < key_heads; head++) {
                    const int64_t first = row * network.query_heads + head * group;
                    attend_own_for(size)(batch.rows.at(network, 0, number, row, head),
                                         batch.rows.at(network, 1, number, row, head),
                                         batch.written[row] + 1, size, group,
                                         rotated + first * size, softmax + first, scratch,
                                         attended + first * size);
                }
            wait_for_all();
            multiply(layer.attention_out, attended, true, stream);
            norm_rows(layer.mlp_norm, normed);
            multiply(layer.swiglu, normed, false, inner);
            multiply(layer.down, inner, true, stream);
        }
        norm_rows(network.final_norm, states);
    }
}

}  // extern "C"
