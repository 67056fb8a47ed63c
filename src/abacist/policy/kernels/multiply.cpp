// A matrix product of any shape and strides, for training.
//
// PyTorch's libraries either use half of some processors or compile a kernel for each new shape,
// and in training every batch has a new shape. Here each panel of weights is packed when its turn
// comes, into memory that stays in the cache, and multiplied with all rows.

#include <algorithm>
#include <vector>

#include "panels.h"

// A sum is taken over at most this many inputs and then added to the others. One float32 sum over a
// large vocabulary would lose small terms, and its panel would not stay in the cache.
constexpr int64_t INPUTS_AT_ONCE = 4096;

extern "C" {

// y [rows, outputs] = (or +=) x [rows, inputs] times weight [outputs, inputs] transposed, plus the
// bias. x and weight have any strides; y has none.
void multiply_any(const float* x, int64_t x_row_step, int64_t x_input_step, const float* weight,
                  int64_t output_step, int64_t input_step, const float* bias, float* y,
                  int64_t rows, int64_t inputs, int64_t outputs, int64_t adds, int threads) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    // With few panels, the rows are divided among the threads too.
    const int64_t tiles = rows / TILE_ROWS<PANEL_VECTORS> + 1;
    const int64_t parts = panels >= 4 * threads ? 1 : std::min<int64_t>(threads, tiles);
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> memory;
        memory.resize(std::min(inputs, INPUTS_AT_ONCE) * PANEL);
        float* const packed = memory.data();
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < panels * parts; piece++) {
            const int64_t panel = piece / parts, part = piece % parts, column = panel * PANEL;
            const int64_t first = rows * part / parts, end = rows * (part + 1) / parts;
            const int64_t count = std::min<int64_t>(outputs - column, PANEL);
            const auto multiply = count > LANES ? multiply_panel<2, false>
                                                : multiply_panel<1, false>;
            float* const to = y + first * outputs;
            int64_t from = 0;
            do {
                const int64_t some = std::min(inputs - from, INPUTS_AT_ONCE);
                if (count < PANEL) std::fill_n(packed, some * PANEL, 0.0f);
                lay_out(weight + column * output_step + from * input_step, output_step, input_step,
                        count, some, packed);
                multiply({x + first * x_row_step + from * x_input_step, x_row_step, x_input_step},
                         end - first, packed, some, bias && from == 0 ? bias + column : nullptr,
                         count, adds || from > 0 ? to : nullptr, to, outputs, column);
                from += some;
            } while (from < inputs);
        }
    }
}

}  // extern "C"
