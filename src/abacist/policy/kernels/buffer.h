// Memory for numbers: on whole cache lines and not initialised.
//
// New memory costs more than the work that is done in it here. So most buffers belong to a thread,
// outlive the calls, and are replaced only where they have to grow.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <type_traits>

constexpr int64_t LINE_BYTES = 64;

template <typename Number>
struct Buffer {
    static_assert(std::is_trivial_v<Number>);  // no constructor is run

    Buffer() = default;
    explicit Buffer(int64_t count) { reserve(count); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    // Makes room for `count` numbers; the contents may be lost.
    void reserve(int64_t count) {
        if (count <= held) return;
        release();
        const int64_t lines = (count * sizeof(Number) + LINE_BYTES - 1) / LINE_BYTES;
        at = static_cast<Number*>(aligned_alloc(LINE_BYTES, lines * LINE_BYTES));
        if (!at) abort();
        held = count;
    }

    void release() {
        free(at);
        at = nullptr;
        held = 0;
    }

    Number* at = nullptr;
    int64_t held = 0;
};
