// Tokens as the tile unit's right operand, and the sums that it leaves. Only where REMUDA_TILES is defined.
#pragma once

#include <cstdint>

#include "tiles.h"
#include "transpose.h"

#ifdef REMUDA_TILES

namespace remuda {

// Tokens as the right operand of the tile unit wants them: [bytes / 4][16 tokens][4 bytes], for each 16 tokens.
struct Packed {
    uint8_t *bytes;
    int64_t token_bytes;  // of one token

    uint8_t *block(int token) const { return bytes + static_cast<int64_t>(token) * token_bytes; }
};

// The words of 16 tokens' 64 bytes of inputs as a tile of the right operand.
REMUDA_AMX inline void store_tile(__m512i (&tokens)[kTileRows], uint8_t *tile) {
    transpose(tokens);
#pragma GCC unroll 16
    for (int word = 0; word < kTileRows; word++) _mm512_storeu_si512(tile + word * kTileBytes, tokens[word]);
}

// Tokens beyond the last, up to a whole tile, are zero. num_inputs: a multiple of 32.
REMUDA_AMX inline void pack_bf16(const uint16_t *tokens, int num_tokens, int64_t num_inputs, const Packed &packed) {
    for (int first = 0; first < num_tokens; first += kTileRows, tokens += kTileRows * num_inputs) {
        uint8_t *tile = packed.block(first);
        for (int64_t k = 0; k < num_inputs; k += kTileBytes / 2, tile += kTileRows * kTileBytes) {
            __m512i rows[kTileRows];
#pragma GCC unroll 16
            for (int t = 0; t < kTileRows; t++) {
                rows[t] = _mm512_setzero_si512();
                if (first + t < num_tokens) rows[t] = _mm512_loadu_si512(tokens + t * num_inputs + k);
            }
            store_tile(rows, tile);
        }
    }
}

// One token's sums with 16 rows of weights, from a tile [16 rows][16 tokens].
REMUDA_AMX inline __m512i column(const int32_t *sums, int token) {
    const __m512i stride = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kTileRows));
    return _mm512_i32gather_epi32(stride, sums + token, 4);
}

REMUDA_AMX inline void store_bf16(uint16_t *output, __m512 values) {
    __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(output), narrow);
}

}  // namespace remuda

#endif
