// Products of bfloat16 pairs by AMX: matrices of 16 rows of 64 bytes in registers of their own, and
// one instruction that multiplies two of them and adds the result to a third.
//
// Of all products here this is the fastest: some ten times the work of float32 for each cycle. A
// panel of pairs is laid out as the instruction wants its right side, and rounded inputs as its
// left one (see pairs.h).
//
//                            weights 6, 7 [16 pairs, 2 * 16 outputs]
//                               |      |
//     inputs 4 [16 rows, 16] -> sums 0, 1 [16 rows, 2 * 16 outputs]
//     inputs 5 [16 rows, 16] -> sums 2, 3
//
// One instruction sums 16 pairs of inputs from zero, and adds that to the sums so far. So whoever
// divides the inputs into pieces does so at a multiple of LINE_PAIRS: then a row has the same
// result to the bit in any company and in any pieces. Numbers below 1.2e-38 count as zero.
#pragma once

#include "buffer.h"
#include "pairs.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

// Pairs of a cache line, and of one row of a register.
constexpr int64_t LINE_PAIRS = LINE_BYTES / sizeof(Pair);

#if HAS_AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr int64_t AMX_ROWS = 16;
constexpr int64_t FETCHED_AHEAD = 1024;  // pairs of a panel: 4 KB

// Whether Linux lets this process use the registers. It has to be asked once, and refuses where
// the processor is emulated without them or a thread's signal stack is too small for them.
static inline bool amx_permitted() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return permitted;
}

// The layout of the eight registers: sums 0 to 3, inputs 4 and 5, weights 6 and 7.
struct alignas(64) AmxLayout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    // For a block of `count` rows, at most 2 * AMX_ROWS.
    explicit AmxLayout(int64_t count) {
        const uint8_t upper = count < AMX_ROWS ? count : AMX_ROWS, lower = count - upper;
        const uint8_t of_register[] = {upper, upper, lower, lower, upper, lower, 16, 16};
        for (int i = 0; i < 8; i++) {
            rows[i] = of_register[i];
            row_bytes[i] = of_register[i] ? 64 : 0;
        }
    }
};

// The registers of this thread in one layout after another; given back at the end, so that the
// kernel need not save them and PyTorch's own library finds them as it expects.
class AmxRegisters {
  public:
    ~AmxRegisters() {
        if (rows_ > 0) _tile_release();
    }

    void lay_out(int64_t rows) {
        if (rows == rows_) return;
        const AmxLayout layout(rows);
        asm volatile("" : : "m"(layout));  // the intrinsic tells of a part of it only
        _tile_loadconfig(&layout);
        rows_ = rows;
    }

  private:
    int64_t rows_ = 0;
};

// The intrinsics do not tell the compiler which memory they read.
static inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// sums [rows, vectors * LANES] = (or +=, if `adds`) a [rows, depth] times b [depth, 2 * LANES], for
// at most AMX_ROWS rows, or, if `both`, twice as many; depth is a multiple of LINE_PAIRS.
// `fetches`: b comes from memory, and what follows is asked for ahead.
template <int vectors, bool both, bool fetches>
static void amx_tile(float* sums, bool adds, Strided<Pair> a, const Pair* b, int64_t depth) {
    constexpr int64_t width = vectors * LANES, sums_bytes = width * sizeof(float);
    constexpr int64_t b_stride = 2 * LANES, b_bytes = b_stride * sizeof(Pair);
    const int64_t a_bytes = a.row * sizeof(Pair);
    const Pair* const lower_a = a.at + AMX_ROWS * a.row;
    float* const lower_sums = sums + AMX_ROWS * width;
    compiler_barrier();
    if (adds) {
        _tile_loadd(0, sums, sums_bytes);
        if constexpr (vectors == 2) _tile_loadd(1, sums + LANES, sums_bytes);
        if constexpr (both) _tile_loadd(2, lower_sums, sums_bytes);
        if constexpr (both && vectors == 2) _tile_loadd(3, lower_sums + LANES, sums_bytes);
    } else {
        _tile_zero(0);
        if constexpr (vectors == 2) _tile_zero(1);
        if constexpr (both) _tile_zero(2);
        if constexpr (both && vectors == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += LINE_PAIRS) {
        const Pair* const weights = b + k * b_stride;
        if constexpr (fetches)
            for (int64_t i = 0; i < LINE_PAIRS * b_stride; i += LINE_PAIRS)
                __builtin_prefetch(weights + FETCHED_AHEAD + i);
        _tile_loadd(6, weights, b_bytes);
        _tile_loadd(4, a.at + k, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (both) {
            _tile_loadd(5, lower_a + k, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (vectors == 2) {
            _tile_loadd(7, weights + LANES, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (both) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, sums_bytes);
    if constexpr (vectors == 2) _tile_stored(1, sums + LANES, sums_bytes);
    if constexpr (both) _tile_stored(2, lower_sums, sums_bytes);
    if constexpr (both && vectors == 2) _tile_stored(3, lower_sums + LANES, sums_bytes);
    compiler_barrier();
}

// The same for any number of rows. `fetches` is meant for the first ones: for the others b lies in
// the caches.
template <int vectors>
static void amx_product(float* sums, int64_t rows, bool adds, Strided<Pair> a, const Pair* b,
                        int64_t depth, bool fetches) {
    AmxRegisters registers;
    for (int64_t row = 0; row < rows; row += 2 * AMX_ROWS) {
        const int64_t count = rows - row < 2 * AMX_ROWS ? rows - row : 2 * AMX_ROWS;
        registers.lay_out(count);
        const bool both = count > AMX_ROWS, ahead = fetches && row == 0;
        const auto tile = both ? ahead ? amx_tile<vectors, true, true>
                                       : amx_tile<vectors, true, false>
                               : ahead ? amx_tile<vectors, false, true>
                                       : amx_tile<vectors, false, false>;
        tile(sums + row * vectors * LANES, adds, a.from_row(row), b, depth);
    }
}

#else

static inline bool amx_permitted() { return false; }

template <int vectors>
static inline void amx_product(float*, int64_t, bool, Strided<Pair>, const Pair*, int64_t, bool) {}

#endif
