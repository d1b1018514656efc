// The products of 2 × 16 rows and 2 × 16 tokens in tiles, by the numbers' format. Only where REMUDA_TILES is defined.
#pragma once

#include "tiles.h"

#ifdef REMUDA_TILES

namespace remuda {

// Sums in tiles 0 to 3; rows in 4 and 5, the first tokens in 6, the second in 7. kBytes: of one number.
struct Bf16Tiles {
    static constexpr int64_t kBytes = 2;
    REMUDA_AMX static void first_tokens() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
    }
    REMUDA_AMX static void second_tokens() {
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    REMUDA_AMX static __m512 as_float(__m512i sums) { return _mm512_castsi512_ps(sums); }
};

struct Int8Tiles {
    static constexpr int64_t kBytes = 1;
    REMUDA_AMX static void first_tokens() {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 5, 6);
    }
    REMUDA_AMX static void second_tokens() {
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 5, 7);
    }
    REMUDA_AMX static __m512 as_float(__m512i sums) { return _mm512_cvtepi32_ps(sums); }
};

}  // namespace remuda

#endif
