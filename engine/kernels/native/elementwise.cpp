// What lies between matrix products, in bfloat16 with float32 arithmetic, each in one pass. For the CPUs that linear.cpp
// is for.

#include <cmath>
#include <cstdint>

#include "swiglu.h"
#include "tiles.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

REMUDA_AMX inline __m512 load(const uint16_t *values) {
    return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)));
}

REMUDA_AMX inline void store(uint16_t *target, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(target), narrowed(values));
}

// output [n] = input ÷ root mean square, rounded, × weight.
REMUDA_AMX inline void normalize(const uint16_t *input, const uint16_t *weight, uint16_t *output, int64_t n, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 x = load(input + i);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(n);
    const __m512 factor = _mm512_set1_ps(1.0F / std::sqrt(mean + eps));
    for (int64_t i = 0; i < n; i += 16) {
        __m512 x = _mm512_mul_ps(load(input + i), factor);
        if (weight) x = _mm512_mul_ps(rounded(x), load(weight + i));
        store(output + i, x);
    }
}

}  // namespace

extern "C" {

// output [rows, n] = input ÷ root mean square of its row, rounded, × weight [n] where it is not null. n: multiple of 16.
REMUDA_AMX void remuda_rms_norm(const uint16_t *input, const uint16_t *weight, uint16_t *output, int64_t num_rows,
                                int64_t n, float eps) {
    for (int64_t row = 0; row < num_rows; row++, input += n, output += n) normalize(input, weight, output, n, eps);
}

// residual [rows, n] += update, rounded; output = the sum's norm as above.
REMUDA_AMX void remuda_add_rms_norm(uint16_t *residual, const uint16_t *update, const uint16_t *weight, uint16_t *output,
                                    int64_t num_rows, int64_t n, float eps) {
    for (int64_t row = 0; row < num_rows; row++, residual += n, update += n, output += n) {
        for (int64_t i = 0; i < n; i += 16) store(residual + i, _mm512_add_ps(load(residual + i), load(update + i)));
        normalize(residual, weight, output, n, eps);
    }
}

// output [rows, n] = silu(gate), rounded, × up, of input [rows, 2n] with the gate first. n: multiple of 16.
REMUDA_AMX void remuda_silu_multiply(const uint16_t *input, uint16_t *output, int64_t num_rows, int64_t n) {
    for (int64_t row = 0; row < num_rows; row++, input += 2 * n, output += n) {
        for (int64_t i = 0; i < n; i += 16) {
            store(output + i, swiglu(load(input + i), load(input + n + i)));
        }
    }
}

// Rotary embedding: element i turns with i + head_dim / 2. input: rows of num_heads × head_dim, row_stride apart; output
// contiguous; cosines and sines float32 [rows, head_dim / 2]. head_dim: multiple of 32.
REMUDA_AMX void remuda_rotate_halves(const uint16_t *input, int64_t row_stride, const float *cosines,
                                     const float *sines, uint16_t *output, int64_t num_rows, int64_t num_heads,
                                     int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t row = 0; row < num_rows; row++, input += row_stride, cosines += half, sines += half) {
        for (int64_t head = 0; head < num_heads; head++, output += head_dim) {
            const uint16_t *values = input + head * head_dim;
            for (int64_t i = 0; i < half; i += 16) {
                const __m512 c = _mm512_loadu_ps(cosines + i), s = _mm512_loadu_ps(sines + i);
                const __m512 first = load(values + i), second = load(values + half + i);
                store(output + i, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
                store(output + half + i, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
            }
        }
    }
}
}

#endif
