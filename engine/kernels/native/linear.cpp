// y = x Wᵀ for few tokens on the CPU's tile unit, with W [out, in] in bfloat16 or in int8 with a scale for each row.
//
// W stays as it lies in the checkpoint: rows of W are the left operand, 16 at a time, so that nothing is packed beside the
// few tokens. Each weight is read once from memory, whatever the number of tokens: a block of rows stays in the
// second-level cache meanwhile. int8 weights meet tokens that are rounded to int8 with a scale for each token.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "token_tiles.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kRowTiles = 2;     // tiles of weights that are computed together
constexpr int kAhead = 8 * 64;   // bytes by which each row of weights is fetched ahead
constexpr int kBlock = 2 * kTileRows;

struct Bf16 {
    using Sum = float;
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

struct Int8 {
    using Sum = int32_t;
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

struct Work {
    const uint8_t *weights;
    Packed tokens;
    uint16_t *output;
    int64_t num_outputs;
    int num_tokens;
    const float *row_scales;    // null: none
    const float *token_scales;  // null: none
};

// sums [16 rows of W][16 tokens] to bfloat16 output [token][row].
template <typename Kind>
REMUDA_AMX void store(const Work &work, int64_t row, int token, const int32_t *sums) {
    const __m512 row_scales = work.row_scales ? _mm512_loadu_ps(work.row_scales + row) : _mm512_set1_ps(1.0F);
    const int n = work.num_tokens - token < kTileRows ? work.num_tokens - token : kTileRows;
    for (int t = 0; t < n; t++) {
        __m512 values = Kind::as_float(column(sums, t));
        if (work.token_scales) {
            values = _mm512_mul_ps(values, _mm512_mul_ps(row_scales, _mm512_set1_ps(work.token_scales[token + t])));
        }
        store_bf16(work.output + (token + t) * work.num_outputs + row, values);
    }
}

REMUDA_AMX void prefetch_rows(const uint8_t *weights, int64_t stride) {
    for (int row = 0; row < kRowTiles * kTileRows; row++) {
        _mm_prefetch(reinterpret_cast<const char *>(weights + row * stride), _MM_HINT_T0);
    }
}

// 32 rows of W by one or two blocks of 16 tokens.
template <typename Kind>
REMUDA_AMX void multiply(const Work &work, int64_t row, int token) {
    const int64_t depth = work.tokens.token_bytes;
    const uint8_t *weights = work.weights + row * depth;
    const uint8_t *left = work.tokens.block(token), *right = left + kTileRows * depth;
    const uint8_t *next = weights + kRowTiles * kTileRows * depth;
    const bool has_two = work.num_tokens - token > kTileRows;
    finish_writes();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileBytes) {
        if (token == 0) prefetch_rows(k + kAhead < depth ? weights + k + kAhead : next + k + kAhead - depth, depth);
        _tile_loadd(4, weights + k, depth);
        _tile_loadd(5, weights + kTileRows * depth + k, depth);
        _tile_loadd(6, left + k * kTileRows, kTileBytes);
        Kind::first_tokens();
        if (has_two) {
            _tile_loadd(7, right + k * kTileRows, kTileBytes);
            Kind::second_tokens();
        }
    }
    alignas(64) int32_t sums[kTileRows * kTileRows];
    _tile_stored(0, sums, kTileBytes);
    store<Kind>(work, row, token, sums);
    _tile_stored(1, sums, kTileBytes);
    store<Kind>(work, row + kTileRows, token, sums);
    if (has_two) {
        _tile_stored(2, sums, kTileBytes);
        store<Kind>(work, row, token + kTileRows, sums);
        _tile_stored(3, sums, kTileBytes);
        store<Kind>(work, row + kTileRows, token + kTileRows, sums);
    }
}

template <typename Kind>
REMUDA_AMX void multiply_all(const Work &work) {
    FullTiles tiles;
    for (int64_t row = 0; row < work.num_outputs; row += kRowTiles * kTileRows) {
        for (int token = 0; token < work.num_tokens; token += kBlock) multiply<Kind>(work, row, token);
    }
}

REMUDA_AMX __m512 wide(const uint16_t *values) {
    __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

// Rounds each token to int8 by its largest magnitude ÷ 127, and packs it; `scales` [num_tokens] are filled. The scale of
// a token with a NaN or an infinite value is NaN, which no int8 could show.
REMUDA_AMX void pack_int8(const uint16_t *tokens, int num_tokens, int64_t num_inputs, const Packed &packed, float *scales) {
    packed.clear(num_tokens);
    for (int token = 0; token < num_tokens; token++) {
        const uint16_t *values = tokens + token * num_inputs;
        __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
        for (int64_t k = 0; k < num_inputs; k += 16) {
            const __m512 value = wide(values + k);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
            poison = _mm512_fmadd_ps(value, _mm512_setzero_ps(), poison);
        }
        const float most = _mm512_reduce_max_ps(largest);
        scales[token] = most / 127.0F + _mm512_reduce_add_ps(poison);
        const __m512 inverse = _mm512_set1_ps(most > 0.0F ? 127.0F / most : 0.0F);
        for (int64_t k = 0; k < num_inputs; k += 16) {
            __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(wide(values + k), inverse));
            alignas(16) uint32_t words[4];
            _mm_store_si128(reinterpret_cast<__m128i *>(words), _mm512_cvtsepi32_epi8(rounded));
            for (int i = 0; i < 4; i++) packed.put(token, k / 4 + i, words[i]);
        }
    }
}

}  // namespace

extern "C" {

int32_t remuda_has_tiles() { return may_use_tiles() ? 1 : 0; }

// output [num_tokens, num_outputs] = tokens [num_tokens, num_inputs] × weightsᵀ, all bfloat16 and contiguous.
// num_outputs and num_inputs are multiples of 32; `scratch` holds num_tokens, rounded up to 16, × num_inputs values.
void remuda_linear_bf16(const uint8_t *weights, const uint16_t *tokens, uint16_t *output, uint8_t *scratch,
                        int64_t num_tokens, int64_t num_inputs, int64_t num_outputs) {
    const Packed packed{scratch, num_inputs * 2};
    pack_bf16(tokens, static_cast<int>(num_tokens), num_inputs, packed);
    multiply_all<Bf16>(Work{weights, packed, output, num_outputs, static_cast<int>(num_tokens), nullptr, nullptr});
}

// The same with int8 weights and float32 row_scales [num_outputs]. num_outputs is a multiple of 32, num_inputs of 64;
// `scratch` holds num_tokens, rounded up to 16, × num_inputs bytes, token_scales [num_tokens] float32.
void remuda_linear_int8(const uint8_t *weights, const float *row_scales, const uint16_t *tokens, uint16_t *output,
                        uint8_t *scratch, float *token_scales, int64_t num_tokens, int64_t num_inputs,
                        int64_t num_outputs) {
    const Packed packed{scratch, num_inputs};
    pack_int8(tokens, static_cast<int>(num_tokens), num_inputs, packed, token_scales);
    multiply_all<Int8>(
        Work{weights, packed, output, num_outputs, static_cast<int>(num_tokens), row_scales, token_scales});
}
}

#else

extern "C" {
int32_t remuda_has_tiles() { return 0; }
}

#endif
