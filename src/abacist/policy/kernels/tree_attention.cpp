// Attention over a tree of texts (see tree.h), forward and backward, divided among threads.
//
// Forward: each (block, key head) is one task, and tasks write different memory. Backward: blocks
// add to the same gradients of keys and values. So the blocks are divided into parts, each part has
// gradients of its own, and these are added up in a fixed order. The result does not depend on the
// number of threads.

#include <type_traits>

#include "attention_block.h"

namespace attention {

// The backward is divided into about this many tasks, for any number of threads.
constexpr int64_t TASKS = 8;

// Calls `what` with the number of vectors that the block's rows fill, as a compile-time constant.
template <int vectors = MAX_VECTORS, typename Do>
void by_width(const Block& block, Do what) {
    if constexpr (vectors > 1)
        if (block.count <= (vectors - 1) * LANES) return by_width<vectors - 1>(block, what);
    what(std::integral_constant<int, vectors>());
}

std::vector<Block> blocks_of(const Attention& batch) {
    return blocks_of(batch.branches, batch.branch_count, batch.heads / batch.key_heads, BLOCK_ROWS);
}

// The gradients of keys and values, as far as each part contributes to them.
struct KeyValueGradients {
    const std::vector<Part>& parts;
    int64_t width;
    std::vector<std::vector<float*>> of_keys, of_values;  // by key head and part

    KeyValueGradients(const Attention& batch, const std::vector<Part>& parts, int64_t width)
        : parts(parts), width(width) {
        // Kept by the thread: allocating it for every layer costs more than clearing it.
        static thread_local Buffer<float> memory;
        int64_t numbers = 0;
        for (const Part& part : parts) numbers += 2 * batch.key_heads * part.tokens * width;
        memory.reserve(numbers);
        float* at = memory.at;
        for (auto* of : {&of_keys, &of_values}) {
            of->resize(batch.key_heads);
            for (auto& of_head : *of)
                for (const Part& part : parts) {
                    of_head.push_back(at);
                    at += part.tokens * width;
                }
        }
    }

    // The sum over the parts that see a token, in a fixed order, times a factor.
    void add_up(const std::vector<float*>& found, int64_t branch, int64_t token, int64_t size,
                float factor, float* to) const {
        for (int64_t d = 0; d < size; d += LANES) {
            Vec total = {};
            for (size_t p = 0; p < parts.size(); p++) {
                const int64_t place = parts[p].places[branch];
                if (place >= 0) total += load(found[p] + (place + token) * width + d);
            }
            total *= factor;
            memcpy(to + d, &total, std::min<int64_t>(LANES, size - d) * sizeof(float));
        }
    }
};

}  // namespace attention

using namespace attention;

extern "C" void attention_forward(const Attention* batch) {
    const std::vector<Block> blocks = blocks_of(*batch);
    const int64_t block_count = blocks.size();
#pragma omp parallel num_threads(batch->threads)
    {
        Worker worker(*batch);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < batch->key_heads; head++)
            for (int64_t b = block_count - 1; b >= 0; b--)
                by_width(blocks[b], [&](auto vectors) {
                    worker.forward<decltype(vectors)::value>(blocks[b], head);
                });
    }
}

extern "C" void attention_backward(const Attention* batch, const Gradients* grad) {
    const std::vector<Block> blocks = blocks_of(*batch);
    const std::vector<Part> parts = parts_of(blocks, batch->branches, batch->branch_count,
                                             std::max<int64_t>(1, TASKS / batch->key_heads));
    const int64_t heads = batch->key_heads, size = batch->size, part_count = parts.size();
    const KeyValueGradients partial(*batch, parts, (size + LANES - 1) / LANES * LANES);
#pragma omp parallel num_threads(batch->threads)
    {
        Worker worker(*batch);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t p = 0; p < part_count; p++) {
                float* const key = partial.of_keys[head][p];
                float* const value = partial.of_values[head][p];
                std::fill_n(key, parts[p].tokens * partial.width, 0.0f);
                std::fill_n(value, parts[p].tokens * partial.width, 0.0f);
                for (size_t b = parts[p].first_block; b < parts[p].end_block; b++)
                    by_width(blocks[b], [&](auto vectors) {
                        worker.backward<decltype(vectors)::value>(blocks[b], parts[p], head, *grad,
                                                                  key, value);
                    });
            }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch->branch_count; b++)
            for (int64_t t = 0; t < batch->branches[b].tokens; t++)
                for (int64_t head = 0; head < heads; head++) {
                    const int64_t to = ((batch->branches[b].start + t) * heads + head) * size;
                    partial.add_up(partial.of_keys[head], b, t, size, LN_2, grad->key + to);
                    partial.add_up(partial.of_values[head], b, t, size, 1, grad->value + to);
                }
    }
}
