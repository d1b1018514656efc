// Attention of prompts, or chunks of them, on the CPU's tile unit, in bfloat16 with the keys and values of a paged cache
// and without matrices of scores (FlashAttention, arXiv 2205.14135).
//
// Everything is computed transposed: scores are keys × queriesᵀ, [position][column], where a column is one query head of
// one token, and sums are valuesᵀ × weights. So keys are the left operand as they lie, the softmax works on whole columns
// without sums across a register, and weights come out in the order that the right operand wants. Only values have to be
// transposed, once for up to 512 columns.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "paged.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kChunk = 128;       // positions that are computed together
constexpr int kColumnTiles = 32;  // of 16 columns, computed with one chunk after another
constexpr float kLowest = -1e30F;

// Tokens of one request that stand in neighbouring rows.
struct Prompt {
    int64_t row;
    int64_t start;  // position of the first
    int64_t count;
    const int64_t *table;
};

// What a token sees: all before it, or those of its chunk, or the last `window` up to itself; 0: no such limit.
struct Visibility {
    int64_t chunk_size;
    int64_t window_size;

    int64_t first(int64_t position) const {
        if (chunk_size) return position / chunk_size * chunk_size;
        return window_size && position >= window_size ? position - window_size + 1 : 0;
    }
};

struct Scratch {
    alignas(64) uint16_t keys[kChunk * kMaxHeadDim];    // [position][head_dim]
    alignas(64) uint16_t values[kMaxHeadDim * kChunk];  // [head_dim][position]
    alignas(64) uint32_t queries[kColumnTiles * kMaxHeadDim / 2 * kTileRows];  // [tile][head_dim / 2][column], pairs
    alignas(64) float sums[kColumnTiles * kMaxHeadDim * kTileRows];            // [tile][head_dim][column]
    alignas(64) float maxima[kColumnTiles * kTileRows];
    alignas(64) float totals[kColumnTiles * kTileRows];
    alignas(64) int32_t positions[kColumnTiles * kTileRows];  // of each column's token
    alignas(64) int32_t firsts[kColumnTiles * kTileRows];     // that it sees
    alignas(64) float scores[2 * kChunk * kTileRows];         // [tile][position][column]
    alignas(64) uint32_t weights[2 * kChunk / 2 * kTileRows];  // [tile][pair of positions][column]
};

// 2ˣ for x ≤ 0, to about 4e-6: much finer than the bfloat16 that it is rounded to. NaN of NaN.
REMUDA_AMX inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0F), x);
    const __m512 n = _mm512_roundscale_ps(x, 0);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.6181291e-3F);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2F));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1F));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1F));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0F));
    return _mm512_scalef_ps(p, n);
}

class PromptAttention {
  public:
    PromptAttention(const Cache &cache, const Visibility &visibility, int64_t heads_per_kv, const uint16_t *query,
                    uint16_t *output, Scratch &scratch)
        : cache_(cache), visibility_(visibility), per_kv_(heads_per_kv), size_(cache.head_dim), query_(query),
          output_(output), scratch_(scratch) {}

    REMUDA_AMX void attend(const Prompt &prompt) {
        const int64_t num_columns = prompt.count * per_kv_;
        for (int64_t head = 0; head < cache_.num_kv_heads; head++) {
            for (int64_t column = 0; column < num_columns; column += kColumnTiles * kTileRows) {
                begin(prompt, head, column, num_columns);
                // Chunks begin at multiples of their size, so that they do not depend on the columns computed together.
                for (int64_t start = first_ / kChunk * kChunk; start < last_; start += kChunk) {
                    add_chunk(prompt, head, start);
                }
                finish(prompt, head, column, num_columns);
            }
        }
    }

  private:
    // Where a column's query, and its output, begins.
    int64_t offset(const Prompt &prompt, int64_t head, int64_t column) const {
        const int64_t row = prompt.row + column / per_kv_;
        return ((row * cache_.num_kv_heads + head) * per_kv_ + column % per_kv_) * size_;
    }

    // The columns from `column` on: their queries are packed. Those past the last see what it sees, and are not written.
    REMUDA_AMX void begin(const Prompt &prompt, int64_t head, int64_t column, int64_t num_columns) {
        const int64_t left = num_columns - column;
        num_tiles_ = static_cast<int>(left >= kColumnTiles * kTileRows ? kColumnTiles : (left + kTileRows - 1) / kTileRows);
        num_tiles_ += num_tiles_ & 1;  // they are computed in pairs
        for (int i = 0; i < num_tiles_ * kTileRows; i++) {
            const int64_t own = column + i < num_columns ? column + i : num_columns - 1;
            const int64_t position = prompt.start + own / per_kv_;
            scratch_.positions[i] = static_cast<int32_t>(position);
            scratch_.firsts[i] = static_cast<int32_t>(visibility_.first(position));
            scratch_.maxima[i] = kLowest;
            scratch_.totals[i] = 0;
        }
        first_ = scratch_.firsts[0];
        last_ = scratch_.positions[num_tiles_ * kTileRows - 1] + 1;
        std::memset(scratch_.sums, 0, num_tiles_ * size_ * kTileRows * sizeof *scratch_.sums);
        for (int tile = 0; tile < num_tiles_; tile++) {
            for (int64_t k = 0; k < size_; k += 32) {
                __m512i rows[kTileRows];
                for (int i = 0; i < kTileRows; i++) {
                    const int64_t own = column + tile * kTileRows + i;
                    rows[i] = own < num_columns ? _mm512_loadu_si512(query_ + offset(prompt, head, own) + k)
                                                : _mm512_setzero_si512();
                }
                transpose(rows);
                uint32_t *packed = scratch_.queries + (tile * size_ + k) / 2 * kTileRows;
                for (int i = 0; i < kTileRows; i++) _mm512_store_si512(packed + i * kTileRows, rows[i]);
            }
        }
    }

    REMUDA_AMX void add_chunk(const Prompt &prompt, int64_t head, int64_t start) {
        const int64_t end = start + kChunk < last_ ? start + kChunk : last_;
        for (int64_t i = start; i < end; i += kStep) take_step(prompt, head, i, static_cast<int>(i - start));
        for (int tile = 0; tile < num_tiles_; tile += 2) {
            const int32_t *positions = scratch_.positions + tile * kTileRows, *firsts = scratch_.firsts + tile * kTileRows;
            const int last_column = 2 * kTileRows - 1;
            const int64_t seen_from = firsts[0] > start ? firsts[0] : start;
            const int64_t seen_to = positions[last_column] + 1 < end ? positions[last_column] + 1 : end;
            if (seen_from >= seen_to) continue;
            const int from = static_cast<int>((seen_from - start) / kStep * kStep);
            const int to = static_cast<int>((seen_to - start + kStep - 1) / kStep * kStep);
            score(tile, from, to);
            const bool is_seen_by_all = start + from >= firsts[last_column] && start + to <= positions[0] + 1;
            for (int i = 0; i < 2; i++) {
                if (is_seen_by_all) {
                    weigh<false>(tile + i, i, from, to, start);
                } else {
                    weigh<true>(tile + i, i, from, to, start);
                }
            }
            add_values(tile, from, to);
        }
    }

    // 32 positions' keys are copied and their values transposed. Those that no column sees are taken for zero.
    REMUDA_AMX void take_step(const Prompt &prompt, int64_t head, int64_t start, int place) {
        const uint16_t *rows[kStep];
        for (int i = 0; i < kStep; i++) {
            const int64_t position = start + i;
            const bool is_seen = position >= first_ && position < last_;
            const int64_t at = is_seen ? cache_.offset(prompt.table, position, head) : 0;
            rows[i] = is_seen ? cache_.values + at : nullptr;
            uint16_t *keys = scratch_.keys + (place + i) * size_;
            for (int64_t k = 0; k < size_; k += 32) {
                _mm512_store_si512(keys + k, is_seen ? _mm512_loadu_si512(cache_.keys + at + k) : _mm512_setzero_si512());
            }
        }
        for (int64_t k = 0; k < size_; k += 32) {
            __m512i low[kTileRows], high[kTileRows];
            for (int i = 0; i < kTileRows; i++) {
                const __m512i a = rows[2 * i] ? _mm512_loadu_si512(rows[2 * i] + k) : _mm512_setzero_si512();
                const __m512i b = rows[2 * i + 1] ? _mm512_loadu_si512(rows[2 * i + 1] + k) : _mm512_setzero_si512();
                low[i] = _mm512_unpacklo_epi16(a, b);
                high[i] = _mm512_unpackhi_epi16(a, b);
            }
            transpose(low);
            transpose(high);
            for (int i = 0; i < kTileRows; i++) {  // unpacking takes four numbers of each eight
                uint16_t *target = scratch_.values + (k + i / 4 * 8 + i % 4) * kChunk + place;
                _mm512_store_si512(target, low[i]);
                _mm512_store_si512(target + 4 * kChunk, high[i]);
            }
        }
    }

    // Scores of positions [from, to) of the chunk with two tiles of columns.
    REMUDA_AMX void score(int tile, int from, int to) {
        const uint32_t *left = scratch_.queries + tile * size_ / 2 * kTileRows, *right = left + size_ / 2 * kTileRows;
        finish_writes();
        for (int i = from; i < to; i += 2 * kTileRows) {
            const uint16_t *keys = scratch_.keys + i * size_;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < size_; k += 32) {
                _tile_loadd(4, keys + k, size_ * 2);
                _tile_loadd(6, left + k / 2 * kTileRows, kTileBytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + k / 2 * kTileRows, kTileBytes);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, keys + kTileRows * size_ + k, size_ * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            float *scores = scratch_.scores + i * kTileRows;
            _tile_stored(0, scores, kTileBytes);
            _tile_stored(1, scores + kChunk * kTileRows, kTileBytes);
            _tile_stored(2, scores + kTileRows * kTileRows, kTileBytes);
            _tile_stored(3, scores + (kChunk + kTileRows) * kTileRows, kTileBytes);
        }
        finish_writes();
    }

    // Scores of one tile of columns to weights (online softmax): what was summed is scaled down where the maximum rose.
    template <bool is_masked>
    REMUDA_AMX void weigh(int tile, int place, int from, int to, int64_t start) {
        const float *scores = scratch_.scores + place * kChunk * kTileRows;
        const __m512i positions = _mm512_load_si512(scratch_.positions + tile * kTileRows);
        const __m512i firsts = _mm512_load_si512(scratch_.firsts + tile * kTileRows);
        const auto seen = [&](int i) __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) {
            const __m512i position = _mm512_set1_epi32(static_cast<int32_t>(start) + i);
            return _mm512_mask_cmple_epi32_mask(_mm512_cmple_epi32_mask(firsts, position), position, positions);
        };
        // log₂ e ÷ √head_dim: powers of two are taken.
        const __m512 factor = _mm512_set1_ps(1.44269504F / std::sqrt(static_cast<float>(size_)));
        const __m512 former = _mm512_load_ps(scratch_.maxima + tile * kTileRows);
        __m512 highest[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
        for (int i = from; i < to; i++) {
            const __mmask16 mask = is_masked ? seen(i) : 0xffff;
            highest[i & 1] = _mm512_mask_max_ps(highest[i & 1], mask, highest[i & 1], _mm512_load_ps(scores + i * kTileRows));
        }
        const __m512 maximum = _mm512_max_ps(former, _mm512_mul_ps(_mm512_max_ps(highest[0], highest[1]), factor));
        const __m512 shrink = power_of_two(_mm512_sub_ps(former, maximum));
        __m512 totals[2] = {_mm512_mul_ps(_mm512_load_ps(scratch_.totals + tile * kTileRows), shrink), _mm512_setzero_ps()};
        uint32_t *weights = scratch_.weights + place * kChunk / 2 * kTileRows;
        for (int i = from; i < to; i += 2) {
            __m512 pair[2];
            for (int j = 0; j < 2; j++) {
                const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + (i + j) * kTileRows), factor, maximum);
                pair[j] = is_masked ? _mm512_maskz_mov_ps(seen(i + j), power_of_two(x)) : power_of_two(x);
                totals[j] = _mm512_add_ps(totals[j], pair[j]);
            }
            _mm512_store_si512(weights + i / 2 * kTileRows, bf16_pairs(pair[0], pair[1]));
        }
        _mm512_store_ps(scratch_.maxima + tile * kTileRows, maximum);
        _mm512_store_ps(scratch_.totals + tile * kTileRows, _mm512_add_ps(totals[0], totals[1]));
        if (_mm512_cmp_ps_mask(former, maximum, _CMP_EQ_OQ) == 0xffff) return;
        float *sums = scratch_.sums + tile * size_ * kTileRows;
        for (int64_t k = 0; k < size_; k++, sums += kTileRows) {
            _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), shrink));
        }
    }

    // valuesᵀ × weights of positions [from, to) of the chunk, added to the sums of two tiles of columns.
    REMUDA_AMX void add_values(int tile, int from, int to) {
        const uint32_t *left = scratch_.weights, *right = left + kChunk / 2 * kTileRows;
        finish_writes();
        for (int64_t k = 0; k < size_; k += 2 * kTileRows) {
            float *sums = scratch_.sums + (tile * size_ + k) * kTileRows, *right_sums = sums + size_ * kTileRows;
            _tile_loadd(0, sums, kTileBytes);
            _tile_loadd(1, right_sums, kTileBytes);
            _tile_loadd(2, sums + kTileRows * kTileRows, kTileBytes);
            _tile_loadd(3, right_sums + kTileRows * kTileRows, kTileBytes);
            for (int i = from; i < to; i += kStep) {
                const uint16_t *values = scratch_.values + k * kChunk + i;
                _tile_loadd(4, values, kChunk * 2);
                _tile_loadd(6, left + i / 2 * kTileRows, kTileBytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + i / 2 * kTileRows, kTileBytes);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, values + kTileRows * kChunk, kChunk * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, sums, kTileBytes);
            _tile_stored(1, right_sums, kTileBytes);
            _tile_stored(2, sums + kTileRows * kTileRows, kTileBytes);
            _tile_stored(3, right_sums + kTileRows * kTileRows, kTileBytes);
        }
        finish_writes();
    }

    REMUDA_AMX void finish(const Prompt &prompt, int64_t head, int64_t column, int64_t num_columns) {
        for (int tile = 0; tile < num_tiles_; tile++) {
            const __m512 inverse =
                _mm512_div_ps(_mm512_set1_ps(1.0F), _mm512_load_ps(scratch_.totals + tile * kTileRows));
            for (int64_t k = 0; k < size_; k += kTileRows) {
                const float *sums = scratch_.sums + (tile * size_ + k) * kTileRows;
                __m512i rows[kTileRows];
                for (int i = 0; i < kTileRows; i++) {
                    rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sums + i * kTileRows), inverse));
                }
                transpose(rows);
                for (int i = 0; i < kTileRows; i++) {
                    const int64_t own = column + tile * kTileRows + i;
                    if (own >= num_columns) break;
                    const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[i])));
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(output_ + offset(prompt, head, own) + k), narrow);
                }
            }
        }
    }

    const Cache &cache_;
    const Visibility &visibility_;
    const int64_t per_kv_;  // query heads that share a key-value head
    const int64_t size_;    // head_dim
    const uint16_t *query_;
    uint16_t *output_;
    Scratch &scratch_;
    int num_tiles_ = 0;
    int64_t first_ = 0, last_ = 0;  // positions [first, last) are seen by some of the columns
};

}  // namespace

extern "C" {

// Attention of `num_prompts` runs of tokens, in bfloat16. rows: of the first token in `query` and `output`
// [tokens, num_kv_heads × heads_per_kv_head, head_dim]; starts: its position; counts: tokens; tables: row numbers in
// block_tables [_, table_width]. chunk_size, window_size: 0 for none. block_size is any, head_dim a multiple of 32.
REMUDA_AMX void remuda_prompt_attention(const uint16_t *query, uint16_t *output, const uint16_t *keys,
                                        const uint16_t *values, const int64_t *block_tables, int64_t table_width,
                                        const int64_t *rows, const int64_t *tables, const int64_t *starts,
                                        const int64_t *counts, int64_t num_prompts, int64_t chunk_size,
                                        int64_t window_size, int64_t block_size, int64_t num_kv_heads,
                                        int64_t heads_per_kv_head, int64_t head_dim) {
    static thread_local Scratch scratch;
    const Cache cache{keys, values, block_size, num_kv_heads, head_dim};
    const Visibility visibility{chunk_size, window_size};
    FullTiles tiles;
    PromptAttention attention(cache, visibility, heads_per_kv_head, query, output, scratch);
    for (int64_t i = 0; i < num_prompts; i++) {
        attention.attend(Prompt{rows[i], starts[i], counts[i], block_tables + tables[i] * table_width});
    }
}
}

#endif
