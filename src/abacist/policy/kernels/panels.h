// Matrix products with weights that are packed beforehand.
//
// A weight matrix [outputs, inputs] is packed in panels of PANEL outputs, each [inputs, PANEL], the
// last one padded with zeros:
//
//     panel 0: outputs 0 to PANEL - 1 of input 0, the same outputs of input 1, ...
//     panel 1: outputs PANEL to 2 PANEL - 1 of input 0, ...
//
// Of weights in pairs, a panel is [pairs of inputs, PANEL]; of weights in 8 bits see blocks.h.
//
// So the inner loop reads the weights front to back, and once: with the few dozen rows of decoding,
// reading the weights is what takes the time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "blocks.h"
#include "pointwise.h"
#include "transpose.h"

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * LANES;

// Packs `count` outputs of weights with any strides as lanes of a panel: to [inputs, PANEL]. From
// Bfloat16 to float they are widened; from float to Bfloat16 is not provided for.
template <typename To, typename From>
static inline void lay_out(const From* from, int64_t output_step, int64_t input_step,
                           int64_t count, int64_t inputs, To* to) {
    // Whole vectors, or whole squares of LANES by LANES, in registers; the rest number by number.
    int64_t rows = 0, columns = 0;
    if (output_step == 1) {
        rows = count / LANES * LANES;
        columns = inputs;
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t output = 0; output < rows; output += LANES)
                store(to + k * PANEL + output, load(from + k * input_step + output));
    } else if (input_step == 1) {
        rows = count / LANES * LANES;
        columns = inputs / LANES * LANES;
        transpose(to, PANEL, from, output_step, rows, columns);
    }
    for (int64_t output = 0; output < count; output++)
        for (int64_t k = output < rows ? columns : 0; k < inputs; k++)
            assign(to[k * PANEL + output], from[output * output_step + k * input_step]);
}

// The same from Bfloat16 to pairs of inputs: to [pairs, PANEL].
static inline void lay_out(const Bfloat16* from, int64_t output_step, int64_t input_step,
                           int64_t count, int64_t inputs, Pair* to) {
    const auto widened_bits = [](const Bfloat16* at) {
        HalfVec halves;
        memcpy(&halves, at, sizeof halves);
        return __builtin_convertvector(halves, UIntVec);
    };
    const int64_t whole = inputs / 2;
    int64_t rows = 0, columns = 0;
    if (output_step == 1) {
        rows = count / LANES * LANES;
        columns = whole;
        for (int64_t k = 0; k < whole; k++)
            for (int64_t output = 0; output < rows; output += LANES) {
                const Bfloat16* const first = from + 2 * k * input_step + output;
                store(to + k * PANEL + output,
                      widened_bits(first) | widened_bits(first + input_step) << 16);
            }
    } else if (input_step == 1 && output_step % 2 == 0) {
        // Two neighbours in memory are a pair: transposed as words of the size of a float.
        rows = count / LANES * LANES;
        columns = whole / LANES * LANES;
        transpose(reinterpret_cast<float*>(to), PANEL, reinterpret_cast<const float*>(from),
                  output_step / 2, rows, columns);
    }
    for (int64_t output = 0; output < count; output++)
        for (int64_t k = output < rows ? columns : 0; k < pairs_of(inputs); k++) {
            const Bfloat16* const first = from + output * output_step + 2 * k * input_step;
            const uint32_t second = k < whole ? first[input_step].bits : 0;
            to[k * PANEL + output].bits = first->bits | second << 16;
        }
}

// How many numbers or pairs an output has.
template <typename Number>
static inline int64_t depth_of(int64_t inputs) {
    return std::is_same_v<Number, Pair> ? pairs_of(inputs) : inputs;
}

// How many numbers, pairs or bytes a panel has.
template <typename Number>
static inline int64_t panel_size(int64_t inputs) {
    return depth_of<Number>(inputs) * PANEL;
}

template <>
inline int64_t panel_size<Code<float>>(int64_t inputs) {
    return inputs / BLOCK * BLOCK_BYTES * PANEL;
}

template <>
inline int64_t panel_size<Code<Pair>>(int64_t inputs) {
    return panel_size<Code<float>>(inputs);
}

// Packs `count` outputs of 8-bit weights, from row `first` on, as lanes of a panel.
static inline void lay_out_codes(const Blocks& weight, int64_t first, int64_t count, int8_t* to) {
    for (int64_t column = 0; column < weight.columns(); column += BLOCK, to += BLOCK_BYTES * PANEL)
        for (int64_t output = 0; output < count; output++) {
            const int8_t* const from = weight.codes(first + output, column);
            for (int64_t k = 0; k < BLOCK; k++) to[k * PANEL + output] = from[k];
            to[BLOCK * PANEL + output] =
                static_cast<int8_t>(weight.exponent(first + output, column));
        }
}

// One vector of a panel's block: its codes begin at `codes`.
class BlockLanes {
  public:
    explicit BlockLanes(const int8_t* codes)
        : codes_(codes), scale_(powers(load_exponents(codes + BLOCK * PANEL))) {}

    // The numbers of one input.
    Vec operator[](int64_t input) const { return load(codes_ + input * PANEL) * scale_; }

  private:
    const int8_t* codes_;
    Vec scale_;
};

// Widens a part of a panel, of `inputs` inputs, to [inputs, PANEL].
static inline void widen_panel(const int8_t* codes, int64_t inputs, float* to) {
    for (int64_t k = 0; k < inputs;
         k += BLOCK, codes += BLOCK_BYTES * PANEL, to += BLOCK * PANEL)
        for (int64_t lane = 0; lane < PANEL; lane += LANES) {
            const BlockLanes numbers(codes + lane);
            for (int64_t i = 0; i < BLOCK; i++) store(to + i * PANEL + lane, numbers[i]);
        }
}

// The same in pairs: to [pairs, PANEL]. The numbers are exact in bfloat16, so their lower halves
// are zero.
static inline void widen_panel(const int8_t* codes, int64_t inputs, Pair* to) {
    for (int64_t k = 0; k < inputs;
         k += BLOCK, codes += BLOCK_BYTES * PANEL, to += BLOCK / 2 * PANEL)
        for (int64_t lane = 0; lane < PANEL; lane += LANES) {
            const BlockLanes numbers(codes + lane);
            for (int64_t i = 0; i < BLOCK / 2; i++)
                store(to + i * PANEL + lane,
                      (UIntVec)numbers[2 * i] >> 16 | (UIntVec)numbers[2 * i + 1]);
        }
}

// Panels are multiplied in groups, with some rows and some inputs at a time, so that what is read
// again lies in the nearest cache that can hold it: the inputs of the rows and the sums in the
// second, a piece of a panel in the first.
constexpr int64_t GROUP_PANELS = 256 / PANEL;
constexpr int64_t GROUP_ROWS = 96;
constexpr int64_t GROUP_INPUTS = 512;
constexpr int64_t FEW_ROWS = 16;  // whose inputs stay in the caches whole; then panels are read on
// Pairs of inputs at a time. With few rows, as in decoding, the weights come from memory and are
// best read on. With more they were packed just now, and lie in the caches.
constexpr int64_t ROWS_DECODED = 64;
constexpr int64_t MOST_PAIRS = 4096;
constexpr int64_t MOST_PAIRS_OF_MANY = 512;
constexpr int64_t ROUNDED_ROWS = 10 * GROUP_ROWS;  // that are held in pairs at a time
constexpr int64_t MOST_PAIRS_KEPT = 8 << 20;        // 32 MB

// x [rows, inputs] rounded to pairs, each row on cache lines of its own.
class Rounded {
  public:
    // An odd number of lines: rows at the distance of a power of two would evict each other.
    static int64_t stride(int64_t inputs) {
        return ((pairs_of(inputs) + LINE_PAIRS - 1) / LINE_PAIRS | 1) * LINE_PAIRS;
    }

    // Memory for so many rows; what it held before may be lost.
    void allocate(int64_t rows, int64_t inputs) {
        stride_ = stride(inputs);
        memory_.reserve(rows * stride_);
    }

    // Memory is kept from call to call, but not much of it.
    void release_much() {
        if (memory_.held > MOST_PAIRS_KEPT) memory_.release();
    }

    void round(Scalars x, int64_t first, int64_t rows, int64_t inputs) {
        round_to_pairs(memory_.at + first * stride_, stride_, x.from_row(first), rows, inputs);
    }

    Strided<Pair> rows_from(int64_t first) const {
        return {memory_.at + first * stride_, stride_, 1};
    }

  private:
    Buffer<Pair> memory_;
    int64_t stride_ = 0;
};

// The sums [rows, vectors * LANES] of a part of a panel in pairs, of `depth` pairs. The first of
// them begins a whole line, see amx.h. `fetches`: it comes from memory.
template <int vectors>
static void multiply_part(float* sums, Strided<Pair> x, int64_t rows, bool adds, const Pair* part,
                          int64_t depth, bool fetches) {
    constexpr int64_t width = vectors * LANES;
    const int64_t by_amx = amx_permitted() ? depth / LINE_PAIRS * LINE_PAIRS : 0;
    if (by_amx > 0) amx_product<vectors>(sums, rows, adds, x, part, by_amx, fetches);
    if (by_amx > 0 && by_amx == depth) return;
    in_blocks<TILE_ROWS<vectors>>(rows, [&](int64_t start, int64_t count) {
        float* const to = sums + start * width;
        const Strided<Pair> rest = {x.at + start * x.row + by_amx, x.row, 1};
        if (adds || by_amx > 0)
            tile_of<vectors, true>(count, to, width, rest, part + by_amx * PANEL, PANEL,
                                   depth - by_amx);
        else
            tile_of<vectors, false>(count, to, width, rest, part + by_amx * PANEL, PANEL,
                                    depth - by_amx);
    });
}

// The same of panels of float or of Bfloat16, of `depth` inputs.
template <int vectors, typename Number>
static void multiply_part(float* sums, Scalars x, int64_t rows, bool adds, const Number* part,
                          int64_t depth) {
    constexpr int64_t width = vectors * LANES;
    in_blocks<TILE_ROWS<vectors>>(rows, [&](int64_t start, int64_t count) {
        float* const to = sums + start * width;
        if (adds)
            tile_of<vectors, true>(count, to, width, x.from_row(start), part, PANEL, depth);
        else
            tile_of<vectors, false>(count, to, width, x.from_row(start), part, PANEL, depth);
    });
}

// The sums of a group of panels in pairs: of each panel [rows, vectors * LANES].
template <int vectors>
static void multiply_group(float* sums, Strided<Pair> x, int64_t rows, const Pair* panels,
                           int64_t panel_count, int64_t inputs) {
    const int64_t depth = pairs_of(inputs), lines = depth / LINE_PAIRS;
    const bool decodes = rows <= ROWS_DECODED;
    const int64_t most = decodes ? MOST_PAIRS : MOST_PAIRS_OF_MANY;
    const int64_t pieces = std::max<int64_t>(1, (depth + most - 1) / most);
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t from = lines * piece / pieces * LINE_PAIRS;
        const int64_t end = piece + 1 < pieces ? lines * (piece + 1) / pieces * LINE_PAIRS : depth;
        for (int64_t panel = 0; panel < panel_count; panel++)
            multiply_part<vectors>(sums + panel * rows * vectors * LANES, {x.at + from, x.row, 1},
                                   rows, from > 0, panels + (panel * depth + from) * PANEL,
                                   end - from, decodes);
    }
}

// What is multiplied with weights that are widened so.
template <typename Widened>
using Multiplied = Strided<std::conditional_t<std::is_same_v<Widened, Pair>, Pair, float>>;

// The same of panels in 8 bits, which are widened piece by piece, as long as a piece stays in the
// nearest caches.
template <int vectors, typename Widened>
static void multiply_group(float* sums, Multiplied<Widened> x, int64_t rows,
                           const Code<Widened>* panels, int64_t panel_count, int64_t inputs) {
    alignas(LINE_BYTES) Widened wide[GROUP_INPUTS * PANEL];
    for (int64_t panel = 0; panel < panel_count; panel++)
        for (int64_t from = 0; from < inputs; from += GROUP_INPUTS) {
            const int64_t count = std::min(GROUP_INPUTS, inputs - from);
            const Code<Widened>* const piece = panels + panel * panel_size<Code<Widened>>(inputs) +
                                               panel_size<Code<Widened>>(from);
            widen_panel(&piece->bits, count, wide);
            float* const to = sums + panel * rows * vectors * LANES;
            const Widened* const part = wide;
            if constexpr (std::is_same_v<Widened, Pair>)
                multiply_part<vectors>(to, {x.at + from / 2, x.row, 1}, rows, from > 0, part,
                                       count / 2, false);
            else
                multiply_part<vectors>(to, {x.at + from * x.column, x.row, x.column}, rows,
                                       from > 0, part, count);
        }
}

// The same of panels of float or of Bfloat16. If `adds`, the products are added to what the sums
// hold. A sum is taken in the order of the inputs, whatever the pieces.
template <int vectors, bool adds = false, typename Number,
          typename = std::enable_if_t<std::is_same_v<Number, float> ||
                                      std::is_same_v<Number, Bfloat16>>>
static void multiply_group(float* sums, Scalars x, int64_t rows, const Number* panels,
                           int64_t panel_count, int64_t inputs) {
    const bool are_few = rows <= FEW_ROWS;
    const int64_t at_once = are_few ? std::max<int64_t>(inputs, 1) : GROUP_INPUTS;
    for (int64_t from = 0; from == 0 || from < inputs; from += at_once) {  // no inputs: zeros
        const int64_t depth = std::min(at_once, inputs - from);
        const Scalars some = {x.at + from * x.column, x.row, x.column};
        for (int64_t panel = 0; panel < panel_count; panel++) {
            float* const to = sums + panel * rows * vectors * LANES;
            const Number* const piece = panels + (panel * inputs + from) * PANEL;
            if constexpr (std::is_same_v<Number, Bfloat16>) {
                if (!are_few) {  // widened once for all tiles
                    alignas(sizeof(Vec)) float wide[GROUP_INPUTS * PANEL];
                    for (int64_t i = 0; i < depth * PANEL; i += LANES)
                        store(wide + i, load(piece + i));
                    multiply_part<vectors>(to, some, rows, adds || from > 0,
                                           static_cast<const float*>(wide), depth);
                    continue;
                }
            }
            multiply_part<vectors>(to, some, rows, adds || from > 0, piece, depth);
        }
    }
}

// The ranks of LoRA that the outputs of one vector of a panel depend on.
struct Ranks {
    int64_t first, end;
};

// sums of a panel [rows, PANEL] += inner_x [rows, ranks] times outer [ranks, PANEL], each vector by
// its own ranks.
static inline void add_lora(float* sums, Scalars inner_x, int64_t rows, const float* outer,
                            const Ranks* of_vectors) {
    const auto add = [&](auto vectors, Ranks ranks, int64_t lane) {
        const Scalars x = {inner_x.at + ranks.first * inner_x.column, inner_x.row, inner_x.column};
        in_blocks<TILE_ROWS<vectors.value>>(rows, [&](int64_t start, int64_t count) {
            tile_of<vectors.value, true>(count, sums + start * PANEL + lane, PANEL,
                                         x.from_row(start), outer + ranks.first * PANEL + lane,
                                         PANEL, ranks.end - ranks.first);
        });
    };
    static_assert(PANEL_VECTORS == 2);
    const Ranks a = of_vectors[0], b = of_vectors[1];
    if (a.first == b.first && a.end == b.end) {
        if (a.first < a.end) add(std::integral_constant<int, 2>{}, a, 0);
        return;
    }
    if (a.first < a.end) add(std::integral_constant<int, 1>{}, a, 0);
    if (b.first < b.end) add(std::integral_constant<int, 1>{}, b, LANES);
}

// What becomes of the sums of a group of panels: y [rows, outputs], from `column` on, = sums + the
// first `biases` of `bias` + `residual`. `bias` may be null; `residual` has the shape of y, may be
// y, and may be null. `gated`: y = silu(first vector) * second vector, and there is no residual.
//
// Row by row: the outputs of a group are neighbours in memory, those of a panel are too few for the
// processor to fetch them ahead.
template <int vectors, bool gated>
static void finish_group(const float* sums, int64_t rows, int64_t panels, const float* bias,
                         int64_t biases, const float* residual, float* y, int64_t outputs,
                         int64_t column) {
    constexpr int64_t width = vectors * LANES, written = gated ? LANES : width;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t panel = 0; panel < panels; panel++) {
            const float* const row = sums + (panel * rows + m) * width;
            const int64_t first = column + panel * written, at = m * outputs + first;
            const int64_t left = outputs - first;
            const auto added = [&](int64_t v) {
                const int64_t from = panel * width + v * LANES;
                return bias ? load_some(bias + from, biases - from) : Vec{};
            };
            if constexpr (gated) {
                const Vec gate = load(row) + added(0), up = load(row + LANES) + added(1);
                store_some(y + at, swiglu(gate, up), left);
                continue;
            }
            for (int64_t v = 0; v < vectors; v++) {
                const int64_t from = v * LANES;
                Vec total = load(row + from) + added(v);
                if (residual) total += load_some(residual + at + from, left - from);
                store_some(y + at + from, total, left - from);
            }
        }
}

// A packed product, with or without LoRA; must match `_Product` in decode.py.
struct Product {
    const void* packed;  // panels of float, of Bfloat16, of Pair, or of Code
    const float* bias;   // in the packed order, padded to whole panels; or null
    int64_t inputs, outputs;
    bool gated;  // SwiGLU: panels hold LANES outputs of the gate, then the same ones of up
    bool bfloat16;
    bool in_blocks;  // 8 bits
    bool in_pairs;   // then one of the two too
    // LoRA, where `ranks` is not 0: panels of A [inputs, PANEL], over the ranks of all adapters; of
    // B, scaled [ranks, PANEL]; and what each vector of each panel needs of them.
    const float *inner, *outer;
    const Ranks* of_vectors;
    int64_t ranks;

    int64_t width() const { return gated ? LANES : PANEL; }  // outputs of a panel

    int64_t panels() const { return (outputs + width() - 1) / width(); }

    int64_t bytes() const {
        const int64_t of_weights = in_blocks  ? panel_size<Code<float>>(inputs)
                                   : bfloat16 ? 2 * inputs * PANEL
                                              : 4 * inputs * PANEL;
        return panels() * (of_weights + PANEL * ranks * 4) + inputs * ranks * 4;
    }

    // The product with A: [rows, inputs] -> [rows, ranks].
    Product inner_product() const {
        return {inner, nullptr, inputs,  ranks,   false,   false,
                false, false,   nullptr, nullptr, nullptr, 0};
    }

    // The panels from `first` to `end` of y [rows, outputs] = x [rows, inputs] W' + bias
    // (+ residual [rows, outputs]; it may be y). `inner_x` [rows, ranks] is what inner_product()
    // makes of x.
    void apply(const float* x, int64_t rows, const float* inner_x, const float* residual, float* y,
               int64_t first, int64_t end) const {
        const auto with = [&](auto number) {
            using Number = decltype(number);
            apply_panels(static_cast<const Number*>(packed), x, rows, inner_x, residual, y, first,
                         end);
        };
        if (in_blocks && in_pairs)
            with(Code<Pair>{});
        else if (in_blocks)
            with(Code<float>{});
        else if (in_pairs)
            with(Pair{});
        else if (bfloat16)
            with(Bfloat16{});
        else
            with(float{});
    }

  private:
    template <typename Number>
    void apply_panels(const Number* panels, const float* x, int64_t rows, const float* inner_x,
                      const float* residual, float* y, int64_t first, int64_t end) const {
        if (first == end) return;
        alignas(64) float sums[GROUP_PANELS * GROUP_ROWS * PANEL];
        const auto finish = gated ? finish_group<PANEL_VECTORS, true>
                                  : finish_group<PANEL_VECTORS, false>;
        // Of x, some rows at a time are rounded, once for all panels.
        constexpr bool in_pairs =
            std::is_same_v<Number, Pair> || std::is_same_v<Number, Code<Pair>>;
        static thread_local Rounded rounded;
        const int64_t at_once = in_pairs ? std::min(rows, ROUNDED_ROWS) : rows;
        for (int64_t start = 0; start < rows; start += at_once) {
            const int64_t block = std::min(at_once, rows - start);
            if constexpr (in_pairs) {
                rounded.allocate(block, inputs);
                rounded.round({x + start * inputs, inputs, 1}, 0, block, inputs);
            }
            for (int64_t panel = first; panel < end; panel += GROUP_PANELS) {
                const int64_t count = std::min(GROUP_PANELS, end - panel);
                const Number* const group = panels + panel * panel_size<Number>(inputs);
                ::in_blocks<GROUP_ROWS>(block, [&](int64_t in_block, int64_t some) {
                    const int64_t row = start + in_block;
                    if constexpr (in_pairs)
                        multiply_group<PANEL_VECTORS>(sums, rounded.rows_from(in_block), some,
                                                      group, count, inputs);
                    else
                        multiply_group<PANEL_VECTORS>(sums, {x + row * inputs, inputs, 1}, some,
                                                      group, count, inputs);
                    if (ranks > 0)
                        for (int64_t i = 0; i < count; i++)
                            add_lora(sums + i * some * PANEL, {inner_x + row * ranks, ranks, 1},
                                     some, outer + (panel + i) * ranks * PANEL,
                                     of_vectors + (panel + i) * PANEL_VECTORS);
                    finish(sums, some, count, bias ? bias + panel * PANEL : nullptr, count * PANEL,
                           residual ? residual + row * outputs : nullptr, y + row * outputs,
                           outputs, panel * width());
                });
            }
        }
    }
};
