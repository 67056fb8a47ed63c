// The tree of a packed batch, divided into work for threads.
//
// Texts lie one after another; each branch continues its parent. For example, with a prompt of five
// tokens and two completions of three:
//
//     branch 0: tokens 0-4, parent -1      branch 1: tokens 5-7, parent 0
//                                          branch 2: tokens 8-10, parent 0
//
// A token sees its own branch up to itself, and all tokens of the branches above.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace attention {

struct Branch {
    int64_t start, tokens, parent;  // the parent is an earlier branch; -1: none
};

// Rows of one branch that are worked on together. A row is one query head of one token; the query
// heads that share a key head are neighbouring rows.
struct Block {
    int64_t branch, first, count;
    int64_t work;  // roughly proportional to the time it takes
};

// Successive blocks, and the branches that they see.
struct Part {
    size_t first_block = 0, end_block = 0;
    std::vector<int64_t> places;  // by branch: its first token among those seen; -1: not seen
    int64_t tokens = 0;           // seen
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

// At most `most` parts of about equal work. Sums are taken part by part, so for results that repeat
// to the bit the number of parts must not depend on the number of threads.
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
