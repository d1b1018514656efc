// What the kernels of attention share: the paged cache, and small transpositions. Only where REMUDA_TILES is defined.
#pragma once

#include <cstdint>

#include "tiles.h"

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

// 16 rows of 16 words become 16 columns.
REMUDA_AMX inline void transpose_words(__m512i (&rows)[16]) {
    __m512i pairs[16], quads[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // quads[4g + i] lane l: column 4l + i of rows 4g … 4g + 3
        const __m512i low = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0xee);
        const __m512i next_low = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0x44);
        const __m512i next_high = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0xee);
        rows[i] = _mm512_shuffle_i32x4(low, next_low, 0x88);
        rows[4 + i] = _mm512_shuffle_i32x4(low, next_low, 0xdd);
        rows[8 + i] = _mm512_shuffle_i32x4(high, next_high, 0x88);
        rows[12 + i] = _mm512_shuffle_i32x4(high, next_high, 0xdd);
    }
}

// 16 words, each of two numbers rounded to bfloat16: low ones in the lower half.
REMUDA_AMX inline __m512i bf16_pairs(__m512 low, __m512 high) {
    const __m512i left = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low)));
    const __m512i right = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high)));
    return _mm512_or_si512(left, _mm512_slli_epi32(right, 16));
}

}  // namespace remuda

#endif
