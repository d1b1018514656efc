// Attention of requests that decode, on the CPU's tile unit: keys and values in bfloat16 are read where they lie in the
// paged cache, once, without being gathered.
//
// One request and as many key-value heads at a time as their query heads fill the tiles' 16 columns: each key-value head
// is multiplied by its own columns only, so that one pass of the softmax serves them all. Positions go in chunks that fit
// into the caches, with a running maximum and sum (online softmax, arXiv 1805.02867).

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tiles.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kMostPositions = 512;     // whose scores are held at once
constexpr int kMostValues = 128 * 1024;  // numbers of values that are held at once
constexpr int kMaxHeadDim = 256;
constexpr int kStep = 32;  // positions of one product with the values

struct Cache {
    const uint16_t *keys;  // [blocks, block_size, num_kv_heads, head_dim]
    const uint16_t *values;
    int64_t block_size;
    int64_t num_kv_heads;
    int64_t head_dim;

    int64_t row() const { return num_kv_heads * head_dim; }
    int64_t offset(const int64_t *table, int64_t position, int64_t head) const {
        return (table[position / block_size] * block_size + position % block_size) * row() + head * head_dim;
    }
};

// Neighbouring key-value heads that are computed together.
struct Heads {
    int64_t first;
    int num_kv;
    int per_kv;  // query heads that share one
};

struct Scratch {
    alignas(64) uint16_t query[kTileRows * kMaxHeadDim * kTileRows];  // [kv head][head_dim / 2][16 columns][2]
    alignas(64) float scores[(kMostPositions + kStep) * kTileRows];   // [position][16 columns]
    alignas(64) uint32_t weights[(kMostPositions / kStep + 1) * kTileRows * kTileRows];  // [32 positions][column][pair]
    alignas(64) uint16_t values[kMostValues + kTileRows * kStep * kMaxHeadDim];  // [kv head][pair][head_dim][2]
    alignas(64) float sums[kTileRows * kTileRows * kMaxHeadDim];  // [kv head][16 columns][head_dim]; only its own count
    alignas(64) float maximum[kTileRows];
    alignas(64) float total[kTileRows];
};

REMUDA_AMX void pack_query(const uint16_t *query, const Heads &heads, int64_t head_dim, Scratch &scratch) {
    auto *pairs = reinterpret_cast<uint32_t *>(scratch.query);
    std::memset(pairs, 0, heads.num_kv * head_dim / 2 * kTileRows * 4);
    for (int column = 0; column < heads.num_kv * heads.per_kv; column++) {
        uint32_t *own = pairs + column / heads.per_kv * head_dim / 2 * kTileRows + column;
        for (int64_t k = 0; k < head_dim / 2; k++) {
            std::memcpy(&own[k * kTileRows], query + column * head_dim + 2 * k, 4);
        }
    }
}

// Scores of 16 positions, which lie in one block, in all columns. `keys`: of the first of the heads.
REMUDA_AMX void score(const uint16_t *keys, const Cache &cache, const Heads &heads, const Scratch &scratch,
                      float *scores) {
    finish_writes();
    _tile_zero(0);
    for (int64_t k = 0; k < heads.num_kv * cache.head_dim; k += 32) {
        _tile_loadd(4, keys + k, cache.row() * 2);
        _tile_loadd(6, scratch.query + k * kTileRows, kTileBytes);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, scores, kTileBytes);
}

// Asks for `num_rows` rows of keys or values, so that they come while something else is computed.
REMUDA_AMX void prefetch(const uint16_t *values, int64_t row, int num_rows, int64_t row_values) {
    for (int i = 0; i < num_rows; i++) {
        for (int64_t k = 0; k < row_values; k += 32) {
            _mm_prefetch(reinterpret_cast<const char *>(values + i * row + k), _MM_HINT_T0);
        }
    }
}

// Values of positions `position` and the next, interleaved; those outside [first, last) count as zero.
REMUDA_AMX void pack_values(const Cache &cache, const int64_t *table, int64_t head, int64_t position, int64_t first,
                            int64_t last, uint16_t *packed) {
    alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low_index = _mm512_load_si512(low);
    const __m512i high_index = _mm512_add_epi16(low_index, _mm512_set1_epi16(16));
    const bool has_left = position >= first && position < last, has_right = position + 1 >= first && position + 1 < last;
    const uint16_t *left = has_left ? cache.values + cache.offset(table, position, head) : nullptr;
    const uint16_t *right = has_right ? cache.values + cache.offset(table, position + 1, head) : nullptr;
    for (int64_t c = 0; c < cache.head_dim; c += 32) {
        const __m512i a = left ? _mm512_loadu_si512(left + c) : _mm512_setzero_si512();
        const __m512i b = right ? _mm512_loadu_si512(right + c) : _mm512_setzero_si512();
        _mm512_store_si512(packed + 2 * c, _mm512_permutex2var_epi16(a, low_index, b));
        _mm512_store_si512(packed + 2 * c + 32, _mm512_permutex2var_epi16(a, high_index, b));
    }
}

// Scores of a chunk to weights: the maximum and total so far are brought up to date, and what was summed is scaled down.
REMUDA_AMX void weigh(Scratch &scratch, const Heads &heads, int num_positions, int64_t skipped, int64_t num_valid,
                      float scale, int64_t head_dim) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 former = _mm512_load_ps(scratch.maximum), maximum = former;
    for (int64_t i = skipped; i < num_valid; i++) {
        maximum = _mm512_max_ps(maximum, _mm512_mul_ps(_mm512_load_ps(scratch.scores + i * kTileRows), factor));
    }
    const __m512 shrink = exponential(_mm512_sub_ps(former, maximum));
    __m512 total = _mm512_mul_ps(_mm512_load_ps(scratch.total), shrink);
    const __m512i stride = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kTileRows));
    for (int i = 0; i < num_positions; i += 2) {
        __m512 pair[2];
        for (int j = 0; j < 2; j++) {
            const bool is_valid = i + j >= skipped && i + j < num_valid;
            const __m512 scores = _mm512_load_ps(scratch.scores + (i + j) * kTileRows);
            pair[j] = is_valid ? exponential(_mm512_fmsub_ps(scores, factor, maximum)) : _mm512_setzero_ps();
            total = _mm512_add_ps(total, pair[j]);
        }
        const __m512i left = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(pair[0])));
        const __m512i right = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(pair[1])));
        uint32_t *target = scratch.weights + i / kStep * kTileRows * kTileRows + i % kStep / 2;
        _mm512_i32scatter_epi32(target, stride, _mm512_or_si512(left, _mm512_slli_epi32(right, 16)), 4);
    }
    _mm512_store_ps(scratch.maximum, maximum);
    _mm512_store_ps(scratch.total, total);
    alignas(64) float factors[kTileRows];
    _mm512_store_ps(factors, shrink);
    for (int column = 0; column < heads.num_kv * heads.per_kv; column++) {
        const __m512 f = _mm512_set1_ps(factors[column]);
        float *sums = scratch.sums + (column / heads.per_kv * kTileRows + column) * head_dim;
        for (int64_t c = 0; c < head_dim; c += 16) {
            _mm512_store_ps(sums + c, _mm512_mul_ps(_mm512_load_ps(sums + c), f));
        }
    }
}

// Adds weights × values of a chunk to the sums of one key-value head, 64 numbers of head_dim at a time.
REMUDA_AMX void add_values(Scratch &scratch, int kv_head, int num_positions, int64_t head_dim) {
    finish_writes();
    const uint16_t *packed = scratch.values + static_cast<int64_t>(kv_head) * num_positions * head_dim;
    for (int64_t c = 0; c < head_dim; c += 64) {
        const bool has_two = head_dim - c > 32;
        float *sums = scratch.sums + kv_head * kTileRows * head_dim + c;
        _tile_loadd(0, sums, head_dim * 4);
        _tile_loadd(1, sums + 16, head_dim * 4);
        if (has_two) {
            _tile_loadd(2, sums + 32, head_dim * 4);
            _tile_loadd(3, sums + 48, head_dim * 4);
        }
        for (int i = 0; i < num_positions; i += kStep) {
            const uint16_t *values = packed + i * head_dim + 2 * c;
            _tile_loadd(4, scratch.weights + i / kStep * kTileRows * kTileRows, kTileBytes);
            _tile_loadd(6, values, head_dim * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, values + 32, head_dim * 4);
            _tile_dpbf16ps(1, 4, 7);
            if (has_two) {
                _tile_loadd(6, values + 64, head_dim * 4);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(7, values + 96, head_dim * 4);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
        _tile_stored(0, sums, head_dim * 4);
        _tile_stored(1, sums + 16, head_dim * 4);
        if (has_two) {
            _tile_stored(2, sums + 32, head_dim * 4);
            _tile_stored(3, sums + 48, head_dim * 4);
        }
    }
}

// One request and some of its heads. `query`, `output`: of the first of them. Positions [first, last) are seen.
REMUDA_AMX void attend(const Cache &cache, const int64_t *table, const Heads &heads, const uint16_t *query,
                       int64_t first, int64_t last, uint16_t *output, Scratch &scratch) {
    const int64_t head_dim = cache.head_dim;
    const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    int64_t chunk = kMostValues / (heads.num_kv * head_dim) / kStep * kStep;
    chunk = chunk > kMostPositions ? kMostPositions : chunk < kStep ? kStep : chunk;
    pack_query(query, heads, head_dim, scratch);
    std::memset(scratch.sums, 0, heads.num_kv * kTileRows * head_dim * sizeof(float));
    _mm512_store_ps(scratch.maximum, _mm512_set1_ps(-INFINITY));
    _mm512_store_ps(scratch.total, _mm512_setzero_ps());
    for (int64_t start = first / kTileRows * kTileRows; start < last; start += chunk) {
        const int64_t end = last - start < chunk ? last - start : chunk;  // positions of this chunk
        const int padded = static_cast<int>((end + kStep - 1) / kStep * kStep);
        for (int64_t i = 0; i < end; i += kTileRows) {
            const uint16_t *keys = cache.keys + cache.offset(table, start + i, heads.first);
            if (i + kTileRows < end) {
                const uint16_t *next = cache.keys + cache.offset(table, start + i + kTileRows, heads.first);
                prefetch(next, cache.row(), kTileRows, heads.num_kv * head_dim);
            }
            score(keys, cache, heads, scratch, scratch.scores + i * kTileRows);
        }
        weigh(scratch, heads, padded, first > start ? first - start : 0, end, scale, head_dim);
        for (int kv_head = 0; kv_head < heads.num_kv; kv_head++) {
            uint16_t *packed = scratch.values + static_cast<int64_t>(kv_head) * padded * head_dim;
            for (int64_t i = 0; i < padded; i += 2) {
                if (i % kTileRows == 0 && i + kTileRows < end) {
                    const int64_t next = start + i + kTileRows;
                    prefetch(cache.values + cache.offset(table, next, heads.first + kv_head), cache.row(), kTileRows,
                             head_dim);
                }
                pack_values(cache, table, heads.first + kv_head, start + i, first, last, packed + i * head_dim);
            }
            add_values(scratch, kv_head, padded, head_dim);
        }
    }
    for (int column = 0; column < heads.num_kv * heads.per_kv; column++) {
        const __m512 inverse = _mm512_set1_ps(1.0F / scratch.total[column]);
        const float *sums = scratch.sums + (column / heads.per_kv * kTileRows + column) * head_dim;
        for (int64_t c = 0; c < head_dim; c += 16) {
            const __m512 values = _mm512_mul_ps(_mm512_load_ps(sums + c), inverse);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(output + column * head_dim + c),
                                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
        }
    }
}

}  // namespace

extern "C" {

int32_t remuda_attention_max_head_dim() { return kMaxHeadDim; }

// Attention of `num_requests` tokens, each the last of its request, in bfloat16. rows: the token's row in `query` and
// `output` [tokens, num_kv_heads × heads_per_kv_head, head_dim]. tables: row numbers in block_tables [_, table_width].
// Positions [firsts, lasts) of each are seen. block_size is a multiple of 16, head_dim of 32; heads_per_kv_head ≤ 16.
REMUDA_AMX void remuda_decode_attention(const uint16_t *query, uint16_t *output, const uint16_t *keys, const uint16_t *values,
                                        const int64_t *block_tables, int64_t table_width, const int64_t *rows,
                             const int64_t *tables, const int64_t *firsts, const int64_t *lasts, int64_t num_requests,
                             int64_t block_size, int64_t num_kv_heads, int64_t heads_per_kv_head, int64_t head_dim) {
    static thread_local Scratch scratch;
    const Cache cache{keys, values, block_size, num_kv_heads, head_dim};
    FullTiles tiles;
    const int64_t most = kTileRows / heads_per_kv_head;
    for (int64_t i = 0; i < num_requests; i++) {
        for (int64_t head = 0; head < num_kv_heads; head += most) {
            const int num_kv = static_cast<int>(num_kv_heads - head < most ? num_kv_heads - head : most);
            const Heads heads{head, num_kv, static_cast<int>(heads_per_kv_head)};
            const int64_t offset = (rows[i] * num_kv_heads + head) * heads_per_kv_head * head_dim;
            attend(cache, block_tables + tables[i] * table_width, heads, query + offset, firsts[i], lasts[i],
                   output + offset, scratch);
        }
    }
}
}

#else

extern "C" {
int32_t remuda_attention_max_head_dim() { return 0; }
}

#endif
