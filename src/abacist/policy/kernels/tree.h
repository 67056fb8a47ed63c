// A tree of texts that lie one after another, cut into work for threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace attention {

struct Branch {
    int64_t start, tokens, parent;  // the parent's place in the list, before its own; -1: none
};

// Rows of one branch that are worked on together: a token has as many rows as a key head has
// query heads, next to each other.
struct Block {
    int64_t branch, first, count;
    int64_t work;  // about in proportion to the time it takes
};

// Blocks that follow each other, and the branches that they see.
struct Part {
    size_t first_block = 0, end_block = 0;
    std::vector<int64_t> places;  // by branch: where its tokens begin among those seen; -1: unseen
    int64_t tokens = 0;           // seen
};

// Memory for numbers, aligned to any vector's needs and not cleared.
struct Floats {
    explicit Floats(int64_t count) { hold(count); }
    Floats(const Floats&) = delete;
    ~Floats() { free(at); }

    // So many from now on; what was there may be lost.
    void hold(int64_t count) {
        if (count <= held) return;
        free(at);
        at = static_cast<float*>(aligned_alloc(64, (count + 15) / 16 * 64));
        if (!at) abort();
        held = count;
    }

    float* at = nullptr;
    int64_t held = 0;
};

inline std::vector<Block> blocks_of(const Branch* branches, int64_t branch_count,
                                           int64_t group, int64_t rows_of_block) {
    std::vector<Block> blocks;
    std::vector<int64_t> above(branch_count);
    for (int64_t b = 0; b < branch_count; b++) {
        const int64_t parent = branches[b].parent, rows = branches[b].tokens * group;
        above[b] = parent < 0 ? 0 : above[parent] + branches[parent].tokens;
        for (int64_t first = 0; first < rows; first += rows_of_block) {
            const int64_t count = std::min(rows_of_block, rows - first);
            blocks.push_back({b, first, count, above[b] + (first + count) / group + 16});
        }
    }
    return blocks;
}

// At most so many parts, each of about as much work. Sums are taken part by part, so their number
// must not depend on the threads.
inline std::vector<Part> parts_of(const std::vector<Block>& blocks, const Branch* branches,
                                         int64_t branch_count, int64_t most) {
    int64_t total = 0, done = 0;
    for (const Block& block : blocks) total += block.work;
    std::vector<Part> parts;
    for (size_t b = 0; b < blocks.size(); b++) {
        if (parts.empty() || done * most >= total * static_cast<int64_t>(parts.size())) {
            parts.emplace_back();
            parts.back().first_block = b;
            parts.back().places.assign(branch_count, -1);
        }
        Part& part = parts.back();
        part.end_block = b + 1;
        done += blocks[b].work;
        for (int64_t at = blocks[b].branch; at >= 0; at = branches[at].parent)
            if (part.places[at] < 0) {
                part.places[at] = part.tokens;
                part.tokens += branches[at].tokens;
            }
    }
    return parts;
}

}  // namespace attention
