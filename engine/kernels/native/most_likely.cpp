// The largest of each row of float32 numbers in one pass.

#include <cmath>
#include <cstdint>

#include "tiles.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

// The first column of the largest of n numbers; −1 where one is NaN or the largest is not finite.
REMUDA_AMX int64_t most_likely(const float *row, int64_t n) {
    const __m512i step = _mm512_set1_epi32(16);
    __m512 largest = _mm512_set1_ps(-INFINITY);
    __m512i columns = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), found = columns;
    __mmask16 is_nan = 0;
    for (int64_t i = 0; i < n; i += 16, columns = _mm512_add_epi32(columns, step)) {
        const __mmask16 is_there = n - i >= 16 ? 0xffff : (1 << (n - i)) - 1;
        const __m512 values = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), is_there, row + i);
        is_nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        const __mmask16 is_larger = _mm512_cmp_ps_mask(values, largest, _CMP_GT_OQ);
        largest = _mm512_mask_mov_ps(largest, is_larger, values);
        found = _mm512_mask_mov_epi32(found, is_larger, columns);
    }
    const float most = _mm512_reduce_max_ps(largest);
    if (is_nan || !std::isfinite(most)) return -1;
    return _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(largest, _mm512_set1_ps(most), _CMP_EQ_OQ), found);
}

}  // namespace

extern "C" {

// output [rows]: of each row of n numbers, row_stride apart. n < 2³¹.
REMUDA_AMX void remuda_most_likely(const float *input, int64_t row_stride, int64_t *output, int64_t num_rows, int64_t n) {
    for (int64_t row = 0; row < num_rows; row++) output[row] = most_likely(input + row * row_stride, n);
}
}

#endif
