// y = x Wᵀ on the CPU's tile unit, with W [out, in] in bfloat16 or in int8 with a scale for each row.
//
// W stays as it lies in the checkpoint: rows of W are the left operand, 32 at a time (a panel). Tokens are packed in
// blocks that the second-level cache holds. Each weight is read from memory once for a block; many tokens then take it
// from a copy in the order of tiles, and up to 32 have a loop of their own (few_tokens.cpp). int8 weights meet tokens
// that are rounded to int8 with a scale for each token. Every sum is made in the order of the inputs, so that a token's
// result does not depend on the tokens beside it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "few_tokens.h"
#include "scratch.h"
#include "tile_kinds.h"
#include "token_tiles.h"
#include "transpose.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kPanelRows = 2 * kTileRows;  // of W, computed together
constexpr int kTokenPair = 2 * kTileRows;  // tokens computed together
constexpr int kTileWords = kTileRows * kTileRows;
constexpr int64_t kBlockBytes = 1 << 20;   // of packed tokens: half of the second-level cache
constexpr int kFetchedPairs = 4;           // with fewer, the CPU fetches a panel in time by itself

// A block of tokens by all of W.
struct Work {
    const uint8_t *weights;
    Packed tokens;
    uint16_t *output;  // of the block's first token
    int64_t num_outputs;
    int num_tokens;
    const float *row_scales;    // null: none
    const float *token_scales;  // null: none; as many as whole tiles have
};

// What is fetched into the second-level cache during a product, in the order of memory: so many lines in each step.
struct Ahead {
    const uint8_t *line;
    int lines_per_step;

    REMUDA_AMX void step() {
        for (int i = 0; i < lines_per_step; i++, line += kTileBytes) {
            __asm__ volatile("prefetcht1 %0" : : "m"(*line));
        }
    }
};

// Sums of a panel with 16 tokens, [32 rows][16], to bfloat16 output [token][row].
template <typename Kind>
REMUDA_AMX void store(const Work &work, int64_t row, int token, const int32_t *sums) {
    const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const float *scales = work.row_scales + row;
    const bool is_scaled = work.row_scales != nullptr;
    const __m512 token_scales = is_scaled ? _mm512_loadu_ps(work.token_scales + token) : _mm512_setzero_ps();
    __m512i pairs[kTileRows];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
        __m512 even = Kind::as_float(_mm512_load_si512(sums + 2 * i * kTileRows));
        __m512 odd = Kind::as_float(_mm512_load_si512(sums + (2 * i + 1) * kTileRows));
        if (is_scaled) {
            even = _mm512_mul_ps(even, _mm512_mul_ps(token_scales, _mm512_set1_ps(scales[2 * i])));
            odd = _mm512_mul_ps(odd, _mm512_mul_ps(token_scales, _mm512_set1_ps(scales[2 * i + 1])));
        }
        const __m512i one_by_one = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
        pairs[i] = _mm512_permutexvar_epi16(in_turn, one_by_one);
    }
    transpose(pairs);
    uint16_t *to = work.output + token * work.num_outputs + row;
    const int n = std::min(work.num_tokens - token, kTileRows);
    for (int t = 0; t < n; t++, to += work.num_outputs) _mm512_storeu_si512(to, pairs[t]);
}

// Where a panel is read: as it lies in memory, where it is also copied in the order of tiles, or from that copy.
enum class From { kMemory, kMemoryToCopy, kCopy };

// A panel by one or two times 16 tokens.
template <typename Kind, bool kHasTwo, From kFrom>
REMUDA_AMX void multiply(const Work &work, int64_t row, int token, uint8_t *copy, Ahead &ahead) {
    const int64_t depth = work.tokens.token_bytes;
    const uint8_t *first = work.weights + row * depth, *second = first + kTileRows * depth;
    const uint8_t *left = work.tokens.block(token), *right = left + kTileRows * depth;
    finish_writes();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint16_t *output = work.output + token * work.num_outputs + row;
    int lines_to_write = std::min(work.num_tokens - token, kHasTwo ? kTokenPair : kTileRows);
    for (int64_t k = 0; k < depth; k += kTileBytes, copy += 2 * kTileBytes * kTileRows) {
        if constexpr (kFrom == From::kCopy) {
            _tile_loadd(4, copy, kTileBytes);
            _tile_loadd(5, copy + kTileBytes * kTileRows, kTileBytes);
        } else {
            _tile_loadd(4, first + k, depth);
            _tile_loadd(5, second + k, depth);
        }
        _tile_loadd(6, left + k * kTileRows, kTileBytes);
        Kind::first_tokens();
        if constexpr (kHasTwo) {
            _tile_loadd(7, right + k * kTileRows, kTileBytes);
            Kind::second_tokens();
        }
        if constexpr (kFrom == From::kMemoryToCopy) {
            _tile_stored(4, copy, kTileBytes);
            _tile_stored(5, copy + kTileBytes * kTileRows, kTileBytes);
        }
        ahead.step();
        if (lines_to_write-- > 0) {
            __asm__ volatile("prefetchw %0" : : "m"(*output));
            output += work.num_outputs;
        }
    }
    alignas(64) int32_t sums[4 * kTileWords];
    _tile_stored(0, sums, kTileBytes);
    _tile_stored(1, sums + kTileWords, kTileBytes);
    if constexpr (kHasTwo) {
        _tile_stored(2, sums + 2 * kTileWords, kTileBytes);
        _tile_stored(3, sums + 3 * kTileWords, kTileBytes);
    }
    finish_writes();
    store<Kind>(work, row, token, sums);
    if constexpr (kHasTwo) store<Kind>(work, row, token + kTileRows, sums + 2 * kTileWords);
}

template <typename Kind, From kFrom>
REMUDA_AMX void multiply_pair(const Work &work, int64_t row, int token, uint8_t *copy, Ahead &ahead) {
    if (work.num_tokens - token > kTileRows) {
        multiply<Kind, true, kFrom>(work, row, token, copy, ahead);
    } else {
        multiply<Kind, false, kFrom>(work, row, token, copy, ahead);
    }
}

template <typename Kind>
REMUDA_AMX void multiply_block(const Work &work, uint8_t *copy) {
    const int64_t panel_bytes = kPanelRows * work.tokens.token_bytes;
    const int num_pairs = (work.num_tokens + kTokenPair - 1) / kTokenPair;
    const int lines_per_step = num_pairs < kFetchedPairs ? 0 : (kPanelRows + num_pairs - 1) / num_pairs;
    const uint8_t *next = work.weights;
    for (int64_t row = 0; row < work.num_outputs; row += kPanelRows) {
        next += panel_bytes;
        Ahead ahead{next, row + kPanelRows < work.num_outputs ? lines_per_step : 0};
        if (num_pairs < kFetchedPairs) {
            for (int token = 0; token < work.num_tokens; token += kTokenPair) {
                multiply_pair<Kind, From::kMemory>(work, row, token, copy, ahead);
            }
        } else {
            multiply<Kind, true, From::kMemoryToCopy>(work, row, 0, copy, ahead);
            for (int token = kTokenPair; token < work.num_tokens; token += kTokenPair) {
                multiply_pair<Kind, From::kCopy>(work, row, token, copy, ahead);
            }
        }
    }
}

// The largest magnitude of a token as the bits of a bfloat16 number: these have the order of the numbers, with infinity
// and NaN above all others.
REMUDA_AMX uint32_t largest_bits(const uint16_t *values, int64_t num_inputs) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
    for (int64_t k = 0; k < num_inputs; k += 64) {
        even = _mm512_max_epu16(even, _mm512_and_si512(_mm512_loadu_si512(values + k), magnitude));
        odd = _mm512_max_epu16(odd, _mm512_and_si512(_mm512_loadu_si512(values + k + 32), magnitude));
    }
    const __m512i both = _mm512_max_epu16(even, odd);
    const __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(0xffff));
    return _mm512_reduce_max_epu32(_mm512_max_epu32(low, _mm512_srli_epi32(both, 16)));
}

// 32 values times `factor`, rounded; two of them in the low half of each 32 bits.
REMUDA_AMX inline __m512i rounded_pairs(const uint16_t *values, __m512 factor) {
    const __m512i both = _mm512_loadu_si512(values);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    const __m512i low = _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(even, factor)), _mm512_set1_epi32(255));
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(odd, factor)), 8));
}

// Up to 16 tokens, rounded to int8 by their largest magnitudes ÷ 127, to tiles of the right operand. The scale of a token
// with a NaN or an infinite value is NaN, which no int8 could show.
REMUDA_AMX void pack_int8(const uint16_t *tokens, int num_tokens, int64_t num_inputs, uint8_t *packed, float *scales) {
    const __m512i low_halves = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28,
                                                26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    float factors[kTileRows] = {};
    for (int t = 0; t < num_tokens; t++) {
        const uint32_t bits = largest_bits(tokens + t * num_inputs, num_inputs) << 16;
        float most;
        std::memcpy(&most, &bits, 4);
        scales[t] = std::isfinite(most) ? most / 127.0F : NAN;
        const float factor = 127.0F / most;
        factors[t] = std::isfinite(factor) ? factor : 0.0F;  // what is below 2⁻¹²⁰ is taken for 0
    }
    for (int64_t k = 0; k < num_inputs; k += kTileBytes, packed += kTileRows * kTileBytes) {
        __m512i rows[kTileRows];
#pragma GCC unroll 16
        for (int t = 0; t < kTileRows; t++) {
            rows[t] = _mm512_setzero_si512();
            if (t >= num_tokens) continue;
            const uint16_t *values = tokens + t * num_inputs + k;
            const __m512 factor = _mm512_set1_ps(factors[t]);
            const __m512i first = rounded_pairs(values, factor), second = rounded_pairs(values + 32, factor);
            rows[t] = _mm512_permutex2var_epi16(first, low_halves, second);
        }
        store_tile(rows, packed);
    }
}

// How many tokens are packed together: blocks are about equally large.
int64_t block_tokens(int64_t num_tokens, int64_t token_bytes) {
    const int64_t most = std::max<int64_t>(kBlockBytes / token_bytes / kTokenPair, 1) * kTokenPair;
    const int64_t num_blocks = std::max<int64_t>((num_tokens + most - 1) / most, 1);
    return ((num_tokens + num_blocks - 1) / num_blocks + kTokenPair - 1) / kTokenPair * kTokenPair;
}

thread_local Scratch packed_tokens, packed_scales, panel_copy;

}  // namespace

extern "C" {

int32_t remuda_has_tiles() { return may_use_tiles() ? 1 : 0; }

// output [num_tokens, num_outputs] = tokens [num_tokens, num_inputs] × weightsᵀ, all bfloat16 and contiguous.
// num_outputs and num_inputs are multiples of 32.
REMUDA_AMX void remuda_linear_bf16(const uint8_t *weights, const uint16_t *tokens, uint16_t *output, int64_t num_tokens,
                                   int64_t num_inputs, int64_t num_outputs) {
    const int64_t size = block_tokens(num_tokens, num_inputs * 2);
    const Packed packed{packed_tokens.at_least(size * num_inputs * 2), num_inputs * 2};
    uint8_t *copy = panel_copy.at_least(kPanelRows * num_inputs * 2);
    FullTiles tiles;
    for (int64_t done = 0; done < num_tokens; done += size) {
        const int n = static_cast<int>(std::min(size, num_tokens - done));
        pack_bf16(tokens + done * num_inputs, n, num_inputs, packed);
        if (n <= kFewTokens) {
            multiply_few_bf16({weights, packed, output + done * num_outputs, num_outputs, n, nullptr, nullptr});
            continue;
        }
        const Work work{weights, packed, output + done * num_outputs, num_outputs, n, nullptr, nullptr};
        multiply_block<Bf16Tiles>(work, copy);
    }
}

// The same with int8 weights and float32 row_scales [num_outputs]. num_outputs is a multiple of 32, num_inputs of 64.
REMUDA_AMX void remuda_linear_int8(const uint8_t *weights, const float *row_scales, const uint16_t *tokens,
                                   uint16_t *output, int64_t num_tokens, int64_t num_inputs, int64_t num_outputs) {
    const int64_t size = block_tokens(num_tokens, num_inputs);
    const Packed packed{packed_tokens.at_least(size * num_inputs), num_inputs};
    uint8_t *copy = panel_copy.at_least(kPanelRows * num_inputs);
    float *scales = reinterpret_cast<float *>(packed_scales.at_least(size * static_cast<int64_t>(sizeof(float))));
    FullTiles tiles;
    for (int64_t done = 0; done < num_tokens; done += size) {
        const int n = static_cast<int>(std::min(size, num_tokens - done));
        for (int token = 0; token < n; token += kTileRows) {
            pack_int8(tokens + (done + token) * num_inputs, std::min(n - token, kTileRows), num_inputs,
                      packed.block(token), scales + token);
        }
        if (n <= kFewTokens) {
            multiply_few_int8({weights, packed, output + done * num_outputs, num_outputs, n, row_scales, scales});
            continue;
        }
        const Work work{weights, packed, output + done * num_outputs, num_outputs, n, row_scales, scales};
        multiply_block<Int8Tiles>(work, copy);
    }
}
}

#else

extern "C" {
int32_t remuda_has_tiles() { return 0; }
}

#endif
