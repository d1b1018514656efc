// A matrix by at most 32 tokens: what takes time is reading the matrix, so nothing else may interrupt it. While a panel of
// rows is multiplied, the next is fetched and the one before is scaled, turned and stored.

#include "few_tokens.h"

#include <algorithm>

#include "overlap.h"
#include "tile_kinds.h"
#include "transpose.h"

#ifdef REMUDA_TILES

namespace remuda {
namespace {

constexpr int kPanelRows = 2 * kTileRows;

// A panel's sums with 16 tokens: first turned to pairs of neighbouring rows for each token, then stored for a few tokens
// at a time.
template <typename Kind>
struct StorePanel {
    static constexpr int kAtOnce = 4, kNum = 1 + kTileRows / kAtOnce;
    const FewTokens &work;

    REMUDA_AMX void operator()(Sums &sums, int64_t row, int block_of_sums, int block, int task) const {
        int32_t *words = sums.of(block_of_sums, 0);  // of the lower and the upper 16 rows, one after another
        if (task == 0) {
            turn(words, row, block * kTileRows);
            return;
        }
        const int first = (task - 1) * kAtOnce;
        const int last = std::min(first + kAtOnce, work.num_tokens - block * kTileRows);
        uint16_t *to = work.output + (block * kTileRows + first) * work.num_outputs + row;
        for (int t = first; t < last; t++, to += work.num_outputs) {
            _mm512_storeu_si512(to, _mm512_load_si512(words + t * kTileRows));
        }
    }

    REMUDA_AMX void turn(int32_t *words, int64_t row, int token) const {
        const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        __m512 token_scales = _mm512_setzero_ps();
        if constexpr (Kind::kBytes == 1) token_scales = _mm512_loadu_ps(work.token_scales + token);
        __m512i pairs[kTileRows];
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) {
            __m512 even = Kind::as_float(_mm512_load_si512(words + 2 * i * kTileRows));
            __m512 odd = Kind::as_float(_mm512_load_si512(words + (2 * i + 1) * kTileRows));
            if constexpr (Kind::kBytes == 1) {
                const float *scales = work.row_scales + row + 2 * i;
                even = _mm512_mul_ps(even, _mm512_mul_ps(token_scales, _mm512_set1_ps(scales[0])));
                odd = _mm512_mul_ps(odd, _mm512_mul_ps(token_scales, _mm512_set1_ps(scales[1])));
            }
            const __m512i one_by_one = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
            pairs[i] = _mm512_permutexvar_epi16(in_turn, one_by_one);
        }
        transpose(pairs);
#pragma GCC unroll 16
        for (int t = 0; t < kTileRows; t++) _mm512_store_si512(words + t * kTileRows, pairs[t]);
    }
};

template <typename Kind>
REMUDA_AMX void multiply_few(const FewTokens &work) {
    const int64_t bytes = work.tokens.token_bytes, num_steps = bytes / kTileBytes;
    const int num_blocks = work.num_tokens > kTileRows ? 2 : 1;
    Finishing<StorePanel<Kind>> finishing(StorePanel<Kind>{work});
    for (int64_t row = 0; row < work.num_outputs; row += kPanelRows) {
        const uint8_t *panel = work.weights + row * bytes, *next = panel + kPanelRows * bytes;
        const Rows rows{panel, panel + kTileRows * bytes, bytes};
        const Rows next_rows{next, next + kTileRows * bytes, bytes};
        Ahead ahead(row + kPanelRows < work.num_outputs ? &next_rows : nullptr, num_steps);
        Sums &sums = finishing.next(row, 0, num_blocks, num_steps);
        if (num_blocks == 2) {
            multiply<Kind, true>(rows, work.tokens.bytes, ahead, finishing, sums);
        } else {
            multiply<Kind, false>(rows, work.tokens.bytes, ahead, finishing, sums);
        }
    }
    finishing.next(0, 0, 0, 1);
    finishing.finish();
}

}  // namespace

void multiply_few_bf16(const FewTokens &work) { multiply_few<Bf16Tiles>(work); }
void multiply_few_int8(const FewTokens &work) { multiply_few<Int8Tiles>(work); }

}  // namespace remuda

#endif
