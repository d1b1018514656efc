// Tokens as the tile unit's right operand, and the sums that it leaves. Only where REMUDA_TILES is defined.
#pragma once

#include <cstdint>
#include <cstring>

#include "tiles.h"

#ifdef REMUDA_TILES

namespace remuda {

// Tokens as the right operand of the tile unit wants them: [bytes / 4][16 tokens][4 bytes], for each 16 tokens.
struct Packed {
    uint8_t *bytes;
    int64_t token_bytes;  // of one token

    uint8_t *block(int token) const { return bytes + static_cast<int64_t>(token) * token_bytes; }
    void put(int token, int64_t word, uint32_t value) const {
        std::memcpy(block(token / kTileRows * kTileRows) + (word * kTileRows + token % kTileRows) * 4, &value, 4);
    }
    void clear(int num_tokens) const {
        std::memset(bytes, 0, (num_tokens + kTileRows - 1) / kTileRows * kTileRows * token_bytes);
    }
};

REMUDA_AMX inline void pack_bf16(const uint16_t *tokens, int num_tokens, int64_t num_inputs, const Packed &packed) {
    packed.clear(num_tokens);
    for (int token = 0; token < num_tokens; token++) {
        for (int64_t k = 0; k < num_inputs; k += 2) {
            uint32_t pair;
            std::memcpy(&pair, tokens + token * num_inputs + k, 4);
            packed.put(token, k / 2, pair);
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
