// What the kernels of attention share: the paged cache, and weights in pairs. Only where REMUDA_TILES is defined.
#pragma once

#include <cstdint>

#include "transpose.h"

#ifdef REMUDA_TILES

namespace remuda {

constexpr int kMaxHeadDim = 256;
constexpr int kStep = 32;  // positions of one product with the values

struct Cache {
    const uint16_t *keys;  // [blocks, block_size, num_kv_heads, head_dim]
    const uint16_t *values;
    int64_t block_size;  // a multiple of 16: 16 positions from a multiple of 16 on lie beside one another
    int64_t num_kv_heads;
    int64_t head_dim;

    int64_t row() const { return num_kv_heads * head_dim; }
    int64_t offset(const int64_t *table, int64_t position, int64_t head) const {
        return (table[position / block_size] * block_size + position % block_size) * row() + head * head_dim;
    }
};

// 16 words, each of two numbers rounded to bfloat16: low ones in the lower half.
REMUDA_AMX inline __m512i bf16_pairs(__m512 low, __m512 high) {
    const __m512i left = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
    const __m512i right = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high)));
    return _mm512_or_si512(left, _mm512_slli_epi32(right, 16));
}

}  // namespace remuda

#endif
