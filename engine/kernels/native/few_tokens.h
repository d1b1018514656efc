// The product of a matrix by at most 32 tokens, see few_tokens.cpp. Only where REMUDA_TILES is defined.
#pragma once

#include <cstdint>

#include "tiles.h"
#include "token_tiles.h"

#ifdef REMUDA_TILES

namespace remuda {

constexpr int kFewTokens = 2 * kTileRows;

struct FewTokens {
    const uint8_t *weights;  // [num_outputs, num_inputs]
    Packed tokens;
    uint16_t *output;  // [num_tokens, num_outputs] bfloat16
    int64_t num_outputs;
    int num_tokens;
    const float *row_scales, *token_scales;  // of int8
};

// Both within FullTiles.
void multiply_few_bf16(const FewTokens &work);
void multiply_few_int8(const FewTokens &work);

}  // namespace remuda

#endif
