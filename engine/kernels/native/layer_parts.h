// The products, norms and sums that layers as single calls are made of. Only where REMUDA_TILES is defined.
#pragma once

#include <cstdint>

#include "tiles.h"

#ifdef REMUDA_TILES

extern "C" {

struct Group;

int32_t remuda_all_reduce(Group *group, uint8_t *values, int64_t count, int32_t element_bytes, int64_t split_bytes);
void remuda_linear_bf16(const uint8_t *weights, const uint16_t *tokens, uint16_t *output, int64_t num_tokens,
                        int64_t num_inputs, int64_t num_outputs);
void remuda_linear_int8(const uint8_t *weights, const float *row_scales, const uint16_t *tokens, uint16_t *output,
                        int64_t num_tokens, int64_t num_inputs, int64_t num_outputs);
void remuda_rms_norm(const uint16_t *input, const uint16_t *weight, uint16_t *output, int64_t num_rows, int64_t n,
                     float eps);
void remuda_add_rms_norm(uint16_t *residual, const uint16_t *update, const uint16_t *weight, uint16_t *output,
                         int64_t num_rows, int64_t n, float eps);
void remuda_silu_multiply(const uint16_t *input, uint16_t *output, int64_t num_rows, int64_t n);

// engine/kernels/decoder_layer.py has the same structure.

// [num_outputs, num_inputs], bfloat16, or int8 with row_scales.
struct Matrix {
    const uint8_t *weights;
    const float *row_scales;
    int64_t num_inputs, num_outputs;
};
}

namespace remuda {

inline void multiply(const Matrix &matrix, const uint16_t *tokens, uint16_t *output, int64_t num_tokens) {
    if (matrix.row_scales) {
        remuda_linear_int8(matrix.weights, matrix.row_scales, tokens, output, num_tokens, matrix.num_inputs,
                           matrix.num_outputs);
    } else {
        remuda_linear_bf16(matrix.weights, tokens, output, num_tokens, matrix.num_inputs, matrix.num_outputs);
    }
}

}  // namespace remuda

#endif
