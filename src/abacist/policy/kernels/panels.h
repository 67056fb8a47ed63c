// Matrix products with weights that are packed beforehand.
//
// A weight matrix [outputs, inputs] is packed in panels of PANEL outputs, each [inputs, PANEL], the
// last one padded with zeros:
//
//     panel 0: outputs 0 to PANEL - 1 of input 0, the same outputs of input 1, ...
//     panel 1: outputs PANEL to 2 PANEL - 1 of input 0, ...
//
// So the inner loop reads the weights front to back, and once: with the few dozen rows of decoding,
// reading the weights is what takes the time.
#pragma once

#include "pointwise.h"
#include "tiles.h"
#include "transpose.h"

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * LANES;

// Packs `count` outputs of weights with any strides as lanes of a panel: to [inputs, PANEL].
static inline void lay_out(const float* from, int64_t output_step, int64_t input_step,
                           int64_t count, int64_t inputs, float* to) {
    if (output_step == 1) {
        for (int64_t k = 0; k < inputs; k++)
            memcpy(to + k * PANEL, from + k * input_step, count * sizeof(float));
        return;
    }
    // Whole squares of LANES by LANES are transposed in registers, the rest number by number.
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

// One panel, or the first `vectors` vectors of it, for all rows of x: y [rows, outputs], from
// `column` on, = x times the weights [inputs, PANEL] + the first `biases` of `bias` + `residual`.
// `bias` may be null; `residual` has the shape of y, may be y, and may be null.
// `gated`: y = silu(first vector) * second vector, and there is no residual.
template <int vectors, bool gated>
static void multiply_panel(Scalars x, int64_t rows, const float* weights, int64_t inputs,
                           const float* bias, int64_t biases, const float* residual, float* y,
                           int64_t outputs, int64_t column) {
    const int64_t left = outputs - column;
    Vec added[vectors] = {};
    if (bias)
        for (int v = 0; v < vectors; v++)
            added[v] = load_some(bias + v * LANES, biases - v * LANES);
    in_blocks<TILE_ROWS<vectors>>(rows, [&](int64_t start, int64_t count) {
        alignas(sizeof(Vec)) float sums[TILE_ROWS<vectors> * vectors * LANES];
        tile_of<vectors, false>(count, sums, vectors * LANES, x.from_row(start), weights, PANEL,
                                inputs);
        for (int64_t m = 0; m < count; m++) {
            const float* const row = sums + m * vectors * LANES;
            const int64_t at = (start + m) * outputs + column;
            if constexpr (gated) {
                const Vec gate = load(row) + added[0], up = load(row + LANES) + added[1];
                store_some(y + at, swiglu(gate, up), left);
                continue;
            }
            for (int64_t v = 0; v < vectors; v++) {
                const int64_t from = v * LANES;
                Vec total = load(row + from) + added[v];
                if (residual) total += load_some(residual + at + from, left - from);
                store_some(y + at + from, total, left - from);
            }
        }
    });
}

// A packed product; must match `_Product` in decode.py.
struct Product {
    const float* packed;
    const float* bias;  // in the packed order, padded to whole panels; or null
    int64_t inputs, outputs;
    bool gated;  // SwiGLU: panels hold LANES outputs of the gate, then the same ones of up

    int64_t width() const { return gated ? LANES : PANEL; }  // outputs of a panel

    int64_t panels() const { return (outputs + width() - 1) / width(); }

    // The panels from `first` to `end` of y [rows, outputs] = x [rows, inputs] W' + bias
    // (+ residual [rows, outputs]; it may be y).
    void apply(const float* x, int64_t rows, const float* residual, float* y, int64_t first,
               int64_t end) const {
        const auto multiply = gated ? multiply_panel<PANEL_VECTORS, true>
                                    : multiply_panel<PANEL_VECTORS, false>;
        for (int64_t panel = first; panel < end; panel++)
            multiply({x, inputs, 1}, rows, packed + panel * inputs * PANEL, inputs,
                     bias ? bias + panel * PANEL : nullptr, PANEL, residual, y, outputs,
                     panel * width());
    }
};
