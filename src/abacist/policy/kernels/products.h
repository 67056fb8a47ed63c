// Matrix products with weights that were laid out for them beforehand.
//
// A weight matrix [outputs, inputs] is packed in panels of PANEL outputs, each [inputs, PANEL], so
// that the innermost loop reads it front to back and once: with a few dozen rows, as in decoding,
// reading the weights is what takes the time. A tile of ROWS x PANEL sums stays in registers.
#pragma once

#include "transpose.h"

constexpr int PANEL = 2 * LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 12;  // of 32 registers, 24 hold sums
#else
constexpr int ROWS = 6;
#endif

// The sums of a tile: `wide` vectors for each of at most ROWS rows.
template <int wide>
struct Sums {
    Vec at[ROWS][wide];
};

// x [rows, inputs] times weights [inputs, wide * LANES], both with any distance between the
// elements that follow each other along rows and inputs.
template <int rows, int wide>
static inline void tile(const float* x, int64_t row_step, int64_t input_step, int64_t inputs,
                        const float* weights, int64_t weight_step, Sums<wide>& sums) {
    Vec total[rows][wide] = {};
    for (int64_t k = 0; k < inputs; k++) {
        Vec weight[wide];
        for (int w = 0; w < wide; w++) weight[w] = load(weights + k * weight_step + w * LANES);
#pragma GCC unroll 12  // or Clang keeps the sums of twelve rows in memory
        for (int m = 0; m < rows; m++) {
            const float value = x[m * row_step + k * input_step];
            for (int w = 0; w < wide; w++) total[m][w] += weight[w] * value;
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        for (int w = 0; w < wide; w++) sums.at[m][w] = total[m][w];
}

// The same for a number of rows that is known only when it runs.
template <int wide, int rows = ROWS>
static inline void tile_of(int64_t wanted, const float* x, int64_t row_step, int64_t input_step,
                           int64_t inputs, const float* weights, int64_t weight_step,
                           Sums<wide>& sums) {
    if (wanted == rows)
        return tile<rows>(x, row_step, input_step, inputs, weights, weight_step, sums);
    if constexpr (rows > 1)
        tile_of<wide, rows - 1>(wanted, x, row_step, input_step, inputs, weights, weight_step,
                                sums);
}

// `rows` in as few blocks of at most ROWS as there can be, all about as large.
template <typename Body>
static inline void in_blocks(int64_t rows, Body body) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = block * rows / blocks;
        body(start, (block + 1) * rows / blocks - start);
    }
}

// `count` outputs of weights with any strides become lanes of a panel: to [inputs, PANEL].
static inline void lay_out(const float* from, int64_t output_step, int64_t input_step,
                           int64_t count, int64_t inputs, float* to) {
    if (output_step == 1) {
        for (int64_t k = 0; k < inputs; k++)
            memcpy(to + k * PANEL, from + k * input_step, count * sizeof(float));
        return;
    }
    int64_t rows = 0, columns = 0;
    if (input_step == 1) {
        rows = count / LANES * LANES;
        columns = inputs / LANES * LANES;
        transpose(to, PANEL, from, output_step, rows, columns);
    }
    for (int64_t output = 0; output < count; output++)
        for (int64_t k = output < rows ? columns : 0; k < inputs; k++)
            to[k * PANEL + output] = from[output * output_step + k * input_step];
}

static inline void store_some(float* to, Vec x, int64_t count) {
    if (count >= LANES)
        store(to, x);
    else if (count > 0)
        memcpy(to, &x, count * sizeof(float));
}

static inline Vec load_some(const float* from, int64_t count) {
    if (count >= LANES) return load(from);
    Vec x = {};
    if (count > 0) memcpy(&x, from, count * sizeof(float));
    return x;
}

static inline Vec sigmoid(Vec x) {
    // Of the two forms the one whose exponential cannot overflow.
    const Vec e = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : all(1.0f)) / (e + 1.0f);
}

// silu(a) * b
static inline Vec gate(Vec a, Vec b) { return a * sigmoid(a) * b; }

// As much of a panel as `wide` vectors hold, for all rows of x: y [rows, outputs] from `column` on
// = x times the weights [inputs, PANEL], plus the first `biases` of `bias` (it may be null), plus
// `residual`, which is like y, may be y, and may be null. `gated`: silu of the first vector times
// the second, and no residual.
template <int wide, bool gated>
static void multiply_panel(const float* x, int64_t row_step, int64_t input_step, int64_t rows,
                           const float* weights, int64_t inputs, const float* bias, int64_t biases,
                           const float* residual, float* y, int64_t outputs, int64_t column) {
    const int64_t left = outputs - column;
    Vec added[wide] = {};
    if (bias)
        for (int w = 0; w < wide; w++) added[w] = load_some(bias + w * LANES, biases - w * LANES);
    in_blocks(rows, [&](int64_t start, int64_t count) {
        Sums<wide> sums;
        tile_of(count, x + start * row_step, row_step, input_step, inputs, weights, PANEL, sums);
        for (int64_t m = 0; m < count; m++) {
            const int64_t at = (start + m) * outputs + column;
            if constexpr (gated) {
                const Vec open = sums.at[m][0] + added[0], passed = sums.at[m][1] + added[1];
                store_some(y + at, gate(open, passed), left);
                continue;
            }
            for (int64_t w = 0; w < wide; w++) {
                const int64_t from = w * LANES;
                Vec total = sums.at[m][w] + added[w];
                if (residual) total += load_some(residual + at + from, left - from);
                store_some(y + at + from, total, left - from);
            }
        }
    });
}

struct Product {
    const float* packed;
    const float* bias;  // in the packed order, padded to whole panels; or null
    int64_t inputs, outputs;
    bool gated;  // panels hold LANES outputs of the gate, then as many of what passes it

    int64_t width() const { return gated ? LANES : PANEL; }  // outputs of a panel

    int64_t panels() const { return (outputs + width() - 1) / width(); }

    // The panels from `first` to `end` of y [rows, outputs] = x [rows, inputs] W' + bias
    // (+ residual [rows, outputs]; it may be y itself).
    void apply(const float* x, int64_t rows, const float* residual, float* y, int64_t first,
               int64_t end) const {
        const auto multiply = gated ? multiply_panel<2, true> : multiply_panel<2, false>;
        for (int64_t panel = first; panel < end; panel++)
            multiply(x, inputs, 1, rows, packed + panel * inputs * PANEL, inputs,
                     bias ? bias + panel * PANEL : nullptr, PANEL, residual, y, outputs,
                     panel * width());
    }
};
