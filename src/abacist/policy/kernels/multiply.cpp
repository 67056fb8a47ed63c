// A matrix product of any shape and strides, for training.
//
// PyTorch's libraries either use half of some processors or compile a kernel for each new shape,
// and in training every batch has a new shape. Here a group of panels of weights is packed when its
// turn comes, and multiplied with all rows.

#include <algorithm>

#include "panels.h"
#include "threads.h"

// A sum is taken over at most this many inputs and then added to the others. One float32 sum over a
// large vocabulary would lose small terms.
constexpr int64_t INPUTS_AT_ONCE = 4096;
// Inputs that are packed for all panels of a group before the next: where outputs lie side by side,
// each input is on another page of memory.
constexpr int64_t PACKED_AT_ONCE = 64;

// A weight matrix [outputs, inputs] of plain numbers with any strides.
template <typename Number>
struct Plain {
    const Number* at;
    int64_t output_step, input_step;

    // Whether the outputs lie side by side in memory.
    bool by_output() const { return output_step == 1; }

    // Packs the panels of `count` outputs, from `first` on, and of some inputs: to [panels, inputs,
    // PANEL], padded with zeros.
    template <typename Packed>
    void pack(int64_t first, int64_t count, int64_t first_input, int64_t inputs, Packed* to) const {
        const int64_t panels = (count + PANEL - 1) / PANEL, size = panel_size<Packed>(inputs);
        if (count % PANEL) std::fill_n(to + (panels - 1) * size, size, Packed{});
        const Number* const start = at + first * output_step + first_input * input_step;
        const int64_t at_once = by_output() ? PACKED_AT_ONCE : inputs;
        for (int64_t from = 0; from < inputs; from += at_once)
            for (int64_t panel = 0; panel < panels; panel++)
                lay_out(start + panel * PANEL * output_step + from * input_step, output_step,
                        input_step, std::min<int64_t>(PANEL, count - panel * PANEL),
                        std::min(at_once, inputs - from),
                        to + panel * size + panel_size<Packed>(from));
    }
};

// The same in 8 bits: the outputs are the rows of `blocks` or, if `transposed`, its columns. They
// are widened to Bfloat16 piece by piece, and then packed like that.
struct InBlocks {
    Blocks blocks;
    bool transposed;

    bool by_output() const { return transposed; }

    template <typename Packed>
    void pack(int64_t first, int64_t count, int64_t first_input, int64_t inputs, Packed* to) const {
        alignas(LINE_BYTES) Bfloat16 wide[PACKED_AT_ONCE * PANEL];
        const int64_t panels = (count + PANEL - 1) / PANEL, size = panel_size<Packed>(inputs);
        if (count % PANEL) std::fill_n(to + (panels - 1) * size, size, Packed{});
        for (int64_t from = 0; from < inputs; from += PACKED_AT_ONCE) {
            const int64_t some = std::min(PACKED_AT_ONCE, inputs - from), input = first_input + from;
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t output = first + panel * PANEL;
                const int64_t outputs = std::min<int64_t>(PANEL, count - panel * PANEL);
                Packed* const here = to + panel * size + panel_size<Packed>(from);
                if (transposed) {
                    for (int64_t k = 0; k < some; k++)
                        blocks.widen_row(input + k, output, outputs, wide + k * PANEL);
                    lay_out(wide, 1, PANEL, outputs, some, here);
                } else {
                    for (int64_t k = 0; k < outputs; k++)
                        blocks.widen_row(output + k, input, some, wide + k * PACKED_AT_ONCE);
                    lay_out(wide, PACKED_AT_ONCE, 1, outputs, some, here);
                }
            }
        }
    }
};

// A product of few inputs, those of LoRA's B, for example: x [rows, ranks] times weight
// [outputs, ranks] transposed. Both have any strides.
struct LowRank {
    Scalars x;
    Plain<float> weight;
    int64_t ranks;  // 0: there is none
};

// y [rows, outputs] = (or +=) x [rows, inputs] times `weight` [outputs, inputs], Plain or InBlocks,
// transposed, plus the bias and the product of low rank. x has any strides; y has none. The weights
// are packed as `Packed`.
template <typename Packed, typename Weight>
static void multiply_any(Scalars x, const Weight& weight, const float* bias, const LowRank& low,
                         float* y, int64_t rows, int64_t inputs, int64_t outputs, bool adds,
                         int threads) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    // As many groups for each thread. With few panels, the rows are divided among them instead.
    const bool few = panels < 4 * threads;
    const int64_t parts = few ? std::min<int64_t>(threads, rows / TILE_ROWS<PANEL_VECTORS> + 1) : 1;
    // Few rows lie in the caches anyway. Then a panel is best multiplied right after its packing.
    const int64_t most = rows <= GROUP_ROWS && !weight.by_output() ? 1 : GROUP_PANELS;
    const int64_t least = (panels + most - 1) / most;
    const int64_t groups = few ? least : (least + threads - 1) / threads * threads;
    static thread_local Rounded rounded_memory;  // of the calling thread, for all of them
    Rounded& rounded = rounded_memory;
    constexpr bool in_pairs = std::is_same_v<Packed, Pair>;
    if (in_pairs) rounded.allocate(rows, std::min(inputs, INPUTS_AT_ONCE));
#pragma omp parallel num_threads(threads)
    {
        static thread_local Buffer<float> sums_memory;
        static thread_local Buffer<Packed> packed_memory;
        static thread_local Buffer<float> low_memory;
        sums_memory.reserve(GROUP_PANELS * PANEL * GROUP_ROWS);
        packed_memory.reserve(GROUP_PANELS * PANEL *
                              depth_of<Packed>(std::min(inputs, INPUTS_AT_ONCE)));
        low_memory.reserve(GROUP_PANELS * PANEL * low.ranks);
        float* const sums = sums_memory.at;
        Packed* const packed = packed_memory.at;
        float* const low_packed = low_memory.at;
        int64_t from = 0;
        do {
            const int64_t some = std::min(inputs - from, INPUTS_AT_ONCE);
            const Scalars some_x = {x.at + from * x.column, x.row, x.column};
            if constexpr (in_pairs) {
                const int own = omp_get_thread_num(), all = omp_get_num_threads();
                const int64_t first = rows * own / all;
                rounded.round(some_x, first, rows * (own + 1) / all - first, some);
#pragma omp barrier
            }
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < groups * parts; piece++) {
                const int64_t group = piece / parts, part = piece % parts;
                const int64_t first_panel = panels * group / groups;
                const int64_t count = panels * (group + 1) / groups - first_panel;
                const int64_t column = first_panel * PANEL;
                const int64_t first = rows * part / parts, end = rows * (part + 1) / parts;
                const int64_t in_group = std::min(count * PANEL, outputs - column);
                const bool one_vector = in_group <= LANES;
                weight.pack(column, in_group, from, some, packed);
                // Added while the sums lie in the caches: a pass over y less.
                const int64_t ranks = from == 0 ? low.ranks : 0;
                if (ranks > 0)
                    low.weight.pack(column, in_group, 0, ranks, low_packed);
                in_blocks<GROUP_ROWS>(end - first, [&](int64_t start, int64_t block_rows) {
                    const int64_t row = first + start;
                    float* const to = y + row * outputs;
                    const float* const residual = adds || from > 0 ? to : nullptr;
                    const auto compute = [&](auto number) {
                        constexpr int vectors = number.value;
                        const auto multiply = [&](auto block) {
                            multiply_group<vectors>(sums, block, block_rows, packed, count, some);
                        };
                        if constexpr (in_pairs)
                            multiply(rounded.rows_from(row));
                        else
                            multiply(some_x.from_row(row));
                        if (ranks > 0)
                            multiply_group<vectors, true>(sums, low.x.from_row(row), block_rows,
                                                          low_packed, count, ranks);
                        finish_group<vectors, false>(
                            sums, block_rows, count, bias && from == 0 ? bias + column : nullptr,
                            outputs - column, residual, to, outputs, column);
                    };
                    if (one_vector)  // then there is at most one panel
                        compute(std::integral_constant<int, 1>{});
                    else
                        compute(std::integral_constant<int, 2>{});
                });
            }
            from += some;
        } while (from < inputs);
    }
    if (in_pairs) rounded.release_much();
}

// The dot product of x and one row of weights, both [count].
static float dot(const float* x, const Bfloat16* weight, int64_t count) {
    constexpr int64_t AT_ONCE = 4;  // sums that do not wait for each other
    Vec sums[AT_ONCE] = {};
    int64_t i = 0;
    for (; i + AT_ONCE * LANES <= count; i += AT_ONCE * LANES)
        for (int64_t j = 0; j < AT_ONCE; j++)
            sums[j] += load(x + i + j * LANES) * load(weight + i + j * LANES);
    float rest = 0;
    for (; i < count; i++) rest += x[i] * widened(weight[i]);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

extern "C" {

// y [outputs] = weight [outputs, inputs] times x [inputs], plus the bias: reads each weight where
// it is, once.
void multiply_row(const float* x, const Bfloat16* weight, const float* bias, float* y,
                  int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t output = 0; output < outputs; output++)
        y[output] = dot(x, weight + output * inputs, inputs) + (bias ? bias[output] : 0);
}

// The same of weights in 8 bits.
void multiply_row_in_blocks(const float* x, const uint8_t* weight, const float* bias, float* y,
                            int64_t inputs, int64_t outputs, int threads) {
    const Blocks blocks = {weight, inputs / BLOCK * BLOCK_BYTES};
#pragma omp parallel for num_threads(threads)
    for (int64_t output = 0; output < outputs; output++)
        y[output] = blocks.dot(output, x) + (bias ? bias[output] : 0);
}

// multiply_any; weight holds float, Bfloat16 or blocks by `format`, 0 to 2, and the narrower ones
// are multiplied in pairs if `in_pairs`.
void multiply_any(const float* x, int64_t x_row_step, int64_t x_input_step, const void* weight,
                  int64_t output_step, int64_t input_step, const float* bias, const float* low_x,
                  int64_t low_x_row_step, int64_t low_x_rank_step, const float* low_weight,
                  int64_t low_output_step, int64_t low_rank_step, int64_t ranks, float* y,
                  int64_t rows, int64_t inputs, int64_t outputs, int64_t adds, int64_t format,
                  int64_t in_pairs, int threads) {
    const LowRank low = {{low_x, low_x_row_step, low_x_rank_step},
                         {low_weight, low_output_step, low_rank_step},
                         ranks};
    const auto multiply = [&](auto packed, const auto& from) {
        multiply_any<decltype(packed)>({x, x_row_step, x_input_step}, from, bias, low, y, rows,
                                       inputs, outputs, adds, threads);
    };
    if (format == 2) {
        const bool transposed = output_step == 1;
        const InBlocks blocks = {
            {static_cast<const uint8_t*>(weight), transposed ? input_step : output_step},
            transposed};
        in_pairs ? multiply(Pair{}, blocks) : multiply(float{}, blocks);
    } else if (format == 1) {
        const Plain<Bfloat16> plain = {static_cast<const Bfloat16*>(weight), output_step,
                                       input_step};
        in_pairs ? multiply(Pair{}, plain) : multiply(float{}, plain);
    } else {
        multiply(float{}, Plain<float>{static_cast<const float*>(weight), output_step, input_step});
    }
}

}  // extern "C"
