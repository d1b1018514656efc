// Attention of requests that decode, on the CPU's tile unit: keys and values in bfloat16 are read where they lie in the
// paged cache, once, without being gathered.
//
// One request and as many key-value heads at a time as their query heads fill the tiles' 16 columns: each key-value head
// is multiplied by its own columns only, so that one pass of the softmax serves them all. Positions go in small chunks
// with a running maximum and sum (online softmax, arXiv 1805.02867); while one chunk is computed the next one, be it of
// another request, is fetched, so that memory waits less.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "paged.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kChunk = 64;  // positions whose scores are held at once

// Which tiles do what. The first five have one row for each query head of a key-value head.
constexpr int kNumShortTiles = 5;  // 0-3: sums of 16 numbers of head_dim; 4: weights

struct Requests {
    const int64_t *rows;
    const int64_t *tables;
    const int64_t *firsts;
    const int64_t *lasts;
    int64_t count;
    const int64_t *block_tables;
    int64_t table_width;
};

// Up to kChunk positions of one request and of neighbouring key-value heads.
struct Chunk {
    int64_t request;
    int64_t head;  // the first
    int num_kv;
    int64_t start;  // a multiple of 16
    int64_t first;  // positions [first, last) of the request are seen
    int64_t last;
    const int64_t *table;

    bool is_first() const { return start <= first; }
    bool is_last() const { return last - start <= kChunk; }
    bool sees(int64_t position) const { return position >= first && position < last; }
    int count() const { return static_cast<int>(is_last() ? last - start : kChunk); }
};

struct Scratch {
    alignas(64) uint16_t query[kTileRows * kMaxHeadDim * kTileRows];  // [kv head][head_dim / 2][16 columns][2]
    alignas(64) float scores[kChunk * kTileRows];                     // [position][16 columns]
    alignas(64) uint32_t weights[kChunk / kStep * kTileRows * kTileRows];  // [32 positions][column][16 pairs]
    alignas(64) uint16_t values[kStep * kTileRows * kMaxHeadDim];          // [16 pairs][kv heads × head_dim][2]
    alignas(64) float sums[kTileRows * kMaxHeadDim];  // [16 columns][head_dim], of each 32 numbers in order of unpacking
    alignas(64) float maximum[kTileRows];
    alignas(64) float total[kTileRows];
};

class DecodeAttention {
  public:
    DecodeAttention(const Cache &cache, const Requests &requests, int64_t heads_per_kv, Scratch &scratch)
        : cache_(cache), requests_(requests), per_kv_(static_cast<int>(heads_per_kv)), scratch_(scratch),
          most_kv_(static_cast<int>(kTileRows / heads_per_kv)) {
        std::memset(scratch_.query, 0, most_kv_ * cache.head_dim * kTileRows * sizeof *scratch_.query);
    }

    REMUDA_AMX void run(const uint16_t *query, uint16_t *output) {
        for (Chunk chunk = first_of(0, 0); is_there(chunk);) {
            const Chunk next = following(chunk);
            if (chunk.is_first()) begin(chunk, query + offset(chunk));
            score(chunk, next);
            weigh(chunk);
            add_values(chunk, next);
            if (chunk.is_last()) finish(chunk, output + offset(chunk));
            chunk = next;
        }
    }

  private:
    Chunk first_of(int64_t request, int64_t head) const {
        if (request == requests_.count) return Chunk{request};
        const int64_t left = cache_.num_kv_heads - head;
        const int64_t first = requests_.firsts[request];
        return Chunk{request,
                     head,
                     static_cast<int>(left < most_kv_ ? left : most_kv_),
                     first / kTileRows * kTileRows,
                     first,
                     requests_.lasts[request],
                     requests_.block_tables + requests_.tables[request] * requests_.table_width};
    }

    bool is_there(const Chunk &chunk) const { return chunk.request < requests_.count; }

    // Of a chunk's first query head, in queries and outputs.
    int64_t offset(const Chunk &chunk) const {
        return (requests_.rows[chunk.request] * cache_.num_kv_heads + chunk.head) * per_kv_ * cache_.head_dim;
    }

    Chunk following(const Chunk &chunk) const {
        if (chunk.is_last()) {
            const int64_t head = chunk.head + chunk.num_kv;
            return head < cache_.num_kv_heads ? first_of(chunk.request, head) : first_of(chunk.request + 1, 0);
        }
        Chunk next = chunk;
        next.start += kChunk;
        return next;
    }

    // 16 positions' keys or values of a chunk, from its i-th position on.
    const uint16_t *rows(const uint16_t *pool, const Chunk &chunk, int i) const {
        return pool + cache_.offset(chunk.table, chunk.start + i, chunk.head);
    }

    // The same of the chunk after it, to be fetched meanwhile; null where it has none.
    const uint16_t *rows_ahead(const uint16_t *pool, const Chunk &next, int i) const {
        return is_there(next) && i < next.count() ? rows(pool, next, i) : nullptr;
    }

    REMUDA_AMX void begin(const Chunk &chunk, const uint16_t *query) {
        auto *pairs = reinterpret_cast<uint32_t *>(scratch_.query);
        for (int column = 0; column < chunk.num_kv * per_kv_; column++) {
            uint32_t *own = pairs + column / per_kv_ * cache_.head_dim / 2 * kTileRows + column;
            for (int64_t k = 0; k < cache_.head_dim / 2; k++) {
                std::memcpy(&own[k * kTileRows], query + column * cache_.head_dim + 2 * k, 4);
            }
        }
        std::memset(scratch_.sums, 0, chunk.num_kv * per_kv_ * cache_.head_dim * sizeof(float));
        _mm512_store_ps(scratch_.maximum, _mm512_set1_ps(-INFINITY));
        _mm512_store_ps(scratch_.total, _mm512_setzero_ps());
    }

    // Scores of 16 positions at a time in all columns.
    REMUDA_AMX void score(const Chunk &chunk, const Chunk &next) {
        finish_writes();
        for (int i = 0; i < chunk.count(); i += kTileRows) {
            const uint16_t *keys = rows(cache_.keys, chunk, i), *ahead = rows_ahead(cache_.keys, next, i);
            _tile_zero(5);
            for (int64_t k = 0; k < chunk.num_kv * cache_.head_dim; k += 32) {
                _tile_loadd(6, keys + k, cache_.row() * 2);
                _tile_loadd(7, scratch_.query + k * kTileRows, kTileBytes);
                _tile_dpbf16ps(5, 6, 7);
                for (int row = 0; ahead && row < kTileRows; row++) fetch(ahead + row * cache_.row() + k);
            }
            _tile_stored(5, scratch_.scores + i * kTileRows, kTileBytes);
        }
        finish_writes();
    }

    // Scores to weights; the maximum and total so far are brought up to date, and what was summed is scaled down.
    REMUDA_AMX void weigh(const Chunk &chunk) {
        const __m512 factor = _mm512_set1_ps(1.0F / std::sqrt(static_cast<float>(cache_.head_dim)));
        const int count = chunk.count(), skipped = static_cast<int>(chunk.is_first() ? chunk.first - chunk.start : 0);
        const __m512 former = _mm512_load_ps(scratch_.maximum);
        __m512 highest[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
        for (int i = skipped; i < count; i++) {
            highest[i & 1] = _mm512_max_ps(highest[i & 1], _mm512_load_ps(scratch_.scores + i * kTileRows));
        }
        const __m512 maximum = _mm512_max_ps(former, _mm512_mul_ps(_mm512_max_ps(highest[0], highest[1]), factor));
        const __m512 shrink = exponential(_mm512_sub_ps(former, maximum));
        __m512 totals[2] = {_mm512_mul_ps(_mm512_load_ps(scratch_.total), shrink), _mm512_setzero_ps()};
        for (int i = 0; i < count; i += kStep) {
            __m512i rows[kTileRows];
            for (int pair = 0; pair < kTileRows; pair++) {
                __m512 weights[2];
                for (int j = 0; j < 2; j++) {
                    const int position = i + 2 * pair + j;
                    const __m512 scores = _mm512_load_ps(scratch_.scores + position * kTileRows);
                    const __mmask16 is_seen = position >= skipped && position < count ? 0xffff : 0;
                    weights[j] = _mm512_maskz_mov_ps(is_seen, exponential(_mm512_fmsub_ps(scores, factor, maximum)));
                    totals[j] = _mm512_add_ps(totals[j], weights[j]);
                }
                rows[pair] = bf16_pairs(weights[0], weights[1]);
            }
            transpose(rows);
            for (int column = 0; column < kTileRows; column++) {
                _mm512_store_si512(scratch_.weights + (i / kStep * kTileRows + column) * kTileRows, rows[column]);
            }
        }
        _mm512_store_ps(scratch_.maximum, maximum);
        _mm512_store_ps(scratch_.total, _mm512_add_ps(totals[0], totals[1]));
        if (!chunk.is_first() && _mm512_cmp_ps_mask(former, maximum, _CMP_NEQ_UQ)) scale_sums(shrink, chunk.num_kv);
    }

    REMUDA_AMX void scale_sums(__m512 factors, int num_kv) {
        alignas(64) float columns[kTileRows];
        _mm512_store_ps(columns, factors);
        for (int column = 0; column < num_kv * per_kv_; column++) {
            const __m512 f = _mm512_set1_ps(columns[column]);
            float *sums = scratch_.sums + column * cache_.head_dim;
            for (int64_t c = 0; c < cache_.head_dim; c += 16) {
                _mm512_store_ps(sums + c, _mm512_mul_ps(_mm512_load_ps(sums + c), f));
            }
        }
    }

    // Adds weights × values of a chunk to the sums.
    REMUDA_AMX void add_values(const Chunk &chunk, const Chunk &next) {
        for (int i = 0; i < chunk.count(); i += kStep) {
            for (int j = i; j < i + kStep; j += kTileRows) {
                uint16_t *packed = scratch_.values + j % kStep * chunk.num_kv * cache_.head_dim;
                pack_values(chunk, j, rows_ahead(cache_.values, next, j), packed);
            }
            for (int kv_head = 0; kv_head < chunk.num_kv; kv_head++) multiply(chunk, kv_head, i);
        }
    }

    // 16 positions' values, the two of each pair interleaved; those that are not seen count as zero, whatever they are.
    REMUDA_AMX void pack_values(const Chunk &chunk, int start, const uint16_t *ahead, uint16_t *packed) const {
        const int64_t width = chunk.num_kv * cache_.head_dim, stride = cache_.row();
        const int64_t begin = chunk.start + start;
        if (begin >= chunk.last) {
            std::memset(packed, 0, kTileRows * width * sizeof *packed);
            return;
        }
        const uint16_t *values = rows(cache_.values, chunk, start);
        for (int i = 0; i < kTileRows; i += 2, values += 2 * stride, packed += 2 * width) {
            const __mmask32 has_left = chunk.sees(begin + i) ? ~0U : 0, has_right = chunk.sees(begin + i + 1) ? ~0U : 0;
            for (int64_t c = 0; c < width; c += 32) {
                if (ahead) {
                    fetch(ahead + i * stride + c);
                    fetch(ahead + (i + 1) * stride + c);
                }
                const __m512i a = _mm512_maskz_loadu_epi16(has_left, values + c);
                const __m512i b = _mm512_maskz_loadu_epi16(has_right, values + stride + c);
                _mm512_store_si512(packed + 2 * c, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(packed + 2 * c + 32, _mm512_unpackhi_epi16(a, b));
            }
        }
    }

    // 64 numbers of head_dim at a time.
    REMUDA_AMX void multiply(const Chunk &chunk, int kv_head, int start) {
        const int64_t size = cache_.head_dim, packed_row = chunk.num_kv * size * 4;
        const uint16_t *packed = scratch_.values + 2 * kv_head * size;
        finish_writes();
        _tile_loadd(4, scratch_.weights + (start / kStep * kTileRows + kv_head * per_kv_) * kTileRows, kTileBytes);
        for (int64_t c = 0; c < size; c += 64) {
            const bool has_two = size - c > 32;
            float *sums = scratch_.sums + kv_head * per_kv_ * size + c;
            const uint16_t *values = packed + 2 * c;
            _tile_loadd(0, sums, size * 4);
            _tile_loadd(6, values, packed_row);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(1, sums + 16, size * 4);
            _tile_loadd(7, values + 32, packed_row);
            _tile_dpbf16ps(1, 4, 7);
            _tile_stored(0, sums, size * 4);
            _tile_stored(1, sums + 16, size * 4);
            if (has_two) {
                _tile_loadd(2, sums + 32, size * 4);
                _tile_loadd(6, values + 64, packed_row);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(3, sums + 48, size * 4);
                _tile_loadd(7, values + 96, packed_row);
                _tile_dpbf16ps(3, 4, 7);
                _tile_stored(2, sums + 32, size * 4);
                _tile_stored(3, sums + 48, size * 4);
            }
        }
        finish_writes();
    }

    REMUDA_AMX void finish(const Chunk &chunk, uint16_t *output) const {
        // Where unpacking put numbers 0-15 and 16-31 of each 32.
        const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int column = 0; column < chunk.num_kv * per_kv_; column++, output += cache_.head_dim) {
            const __m512 inverse = _mm512_set1_ps(1.0F / scratch_.total[column]);
            const float *sums = scratch_.sums + column * cache_.head_dim;
            for (int64_t c = 0; c < cache_.head_dim; c += 32) {
                const __m512 a = _mm512_mul_ps(_mm512_load_ps(sums + c), inverse);
                const __m512 b = _mm512_mul_ps(_mm512_load_ps(sums + c + 16), inverse);
                const __m512 left = _mm512_permutex2var_ps(a, low, b), right = _mm512_permutex2var_ps(a, high, b);
                _mm512_storeu_si512(output + c, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(right, left)));
            }
        }
    }

    const Cache &cache_;
    const Requests &requests_;
    const int per_kv_;  // query heads that share a key-value head
    Scratch &scratch_;
    const int most_kv_;
};

}  // namespace

extern "C" {

int32_t remuda_attention_max_head_dim() { return kMaxHeadDim; }

// Attention of `num_requests` tokens, each the last of its request, in bfloat16. rows: the token's row in `query` and
// `output` [tokens, num_kv_heads × heads_per_kv_head, head_dim]. tables: row numbers in block_tables [_, table_width].
// Positions [firsts, lasts) of each are seen. block_size is a multiple of 16, head_dim of 32; heads_per_kv_head ≤ 16.
REMUDA_AMX void remuda_decode_attention(const uint16_t *query, uint16_t *output, const uint16_t *keys,
                                        const uint16_t *values, const int64_t *block_tables, int64_t table_width,
                                        const int64_t *rows, const int64_t *tables, const int64_t *firsts,
                                        const int64_t *lasts, int64_t num_requests, int64_t block_size,
                                        int64_t num_kv_heads, int64_t heads_per_kv_head, int64_t head_dim) {
    static thread_local Scratch scratch;
    const Cache cache{keys, values, block_size, num_kv_heads, head_dim};
    const Requests requests{rows, tables, firsts, lasts, num_requests, block_tables, table_width};
    FullTiles tiles(kNumShortTiles, static_cast<int>(heads_per_kv_head));
    DecodeAttention(cache, requests, heads_per_kv_head, scratch).run(query, output);
}
}

#else

extern "C" {
int32_t remuda_attention_max_head_dim() { return 0; }
}

#endif
