// 16 × 16 words of 32 bits, turned in registers. Only where REMUDA_TILES is defined.
#pragma once

#include "tiles.h"

#ifdef REMUDA_TILES

namespace remuda {

// Row i of the result holds word i of every row.
REMUDA_AMX inline void transpose(__m512i (&rows)[16]) {
    __m512i turned[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        turned[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        turned[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(turned[i], turned[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(turned[i], turned[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(turned[i + 1], turned[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(turned[i + 1], turned[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        turned[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        turned[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        turned[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        turned[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(turned[i], turned[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(turned[i], turned[i + 8], 0xdd);
    }
}

}  // namespace remuda

#endif
