// The routed experts of a layer on the CPU's tile unit: down(silu(gate(x)) · up(x)) of each expert's tokens, with weights
// in bfloat16 or in int8 with a scale for each row.
//
// As in linear.cpp weights are the left operand, as they lie in the checkpoint, and are read once for up to kMostTokens
// tokens of an expert. While a block of their rows is multiplied the next one is fetched in the order of memory, across
// matrices and experts. What an expert's first product leaves in the tiles is already turned as its second one wants it.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "swiglu.h"
#include "tiles.h"
#include "transpose.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kTokenPair = 2 * kTileRows;  // tokens that are multiplied together
constexpr int64_t kMostTokens = 256;       // so many that computing takes longer than reading the weights
constexpr int kTileWords = kTileRows * kTileRows;

struct Expert {
    const uint8_t *gate_up, *down;
    const float *gate_up_scales, *down_scales;  // of int8
};

// Two times 16 rows of weights, each 16 one after another in memory.
struct Rows {
    const uint8_t *first, *second;
    int64_t bytes;  // of a row
};

// Fetches rows that are wanted soon, evenly over so many steps.
class Ahead {
  public:
    Ahead(const Rows *rows, int64_t num_steps) {
        if (rows == nullptr) return;
        const int64_t num_lines = kTileRows * rows->bytes / kTileBytes;
        first_ = rows->first;
        second_ = rows->second;
        end_ = first_ + num_lines * kTileBytes;
        lines_per_step_ = (num_lines + num_steps - 1) / num_steps;
    }
    REMUDA_AMX void step() {
        for (int64_t i = 0; i < lines_per_step_ && first_ < end_; i++, first_ += kTileBytes, second_ += kTileBytes) {
            _mm_prefetch(reinterpret_cast<const char *>(first_), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char *>(second_), _MM_HINT_T1);
        }
    }

  private:
    const uint8_t *first_ = nullptr, *second_ = nullptr, *end_ = nullptr;
    int64_t lines_per_step_ = 0;
};

// Of both 16 rows with 16 tokens, and with 16 more: [16 rows][16 tokens] each.
struct alignas(64) Sums {
    int32_t tiles[4][kTileWords];
};

struct Bf16 {
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

struct Int8 {
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

// `tokens` and what follows, if anything: 16 tokens each as the right operand, [bytes / 4][16 tokens][4 bytes].
template <typename Kind, bool kHasTwo>
REMUDA_AMX inline void multiply(const Rows &rows, const uint8_t *tokens, Ahead &ahead, Sums &sums) {
    const uint8_t *left = tokens, *right = tokens + kTileRows * rows.bytes;
    finish_writes();
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kHasTwo) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < rows.bytes; k += kTileBytes) {
        ahead.step();
        _tile_loadd(4, rows.first + k, rows.bytes);
        _tile_loadd(5, rows.second + k, rows.bytes);
        _tile_loadd(6, left + k * kTileRows, kTileBytes);
        Kind::first_tokens();
        if constexpr (kHasTwo) {
            _tile_loadd(7, right + k * kTileRows, kTileBytes);
            Kind::second_tokens();
        }
    }
    _tile_stored(0, sums.tiles[0], kTileBytes);
    _tile_stored(1, sums.tiles[1], kTileBytes);
    if constexpr (kHasTwo) {
        _tile_stored(2, sums.tiles[2], kTileBytes);
        _tile_stored(3, sums.tiles[3], kTileBytes);
    }
    finish_writes();
}

// 16 tokens as the right operand. `rows`: token i's bytes are at rows + i × row_bytes; a multiple of 64 of each.
REMUDA_AMX void pack(const uint8_t *rows, int num_tokens, int64_t row_bytes, uint8_t *packed) {
    for (int64_t k = 0; k < row_bytes; k += kTileBytes, packed += kTileWords * 4) {
        __m512i words[kTileRows];
#pragma GCC unroll 16
        for (int t = 0; t < kTileRows; t++) {
            words[t] = t < num_tokens ? _mm512_loadu_si512(rows + t * row_bytes + k) : _mm512_setzero_si512();
        }
        transpose(words);
#pragma GCC unroll 16
        for (int word = 0; word < kTileRows; word++) _mm512_store_si512(packed + word * kTileBytes, words[word]);
    }
}

// Adds to the largest magnitudes, by which numbers are rounded to int8. What is not finite goes to `poison`, which makes
// the scale NaN: no int8 could show it.
REMUDA_AMX inline void see(__m512 values, __m512 &largest, __m512 &poison) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
    poison = _mm512_fmadd_ps(values, _mm512_setzero_ps(), poison);
}

// A token [num_inputs] to int8; its scale is returned.
REMUDA_AMX float quantize(const uint16_t *token, int64_t num_inputs, uint8_t *codes) {
    __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
    for (int64_t k = 0; k < num_inputs; k += 16) {
        see(widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(token + k))), largest, poison);
    }
    const float most = _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(most > 0.0F ? 127.0F / most : 0.0F);
    for (int64_t k = 0; k < num_inputs; k += 16) {
        const __m512 values = widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(token + k)));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + k), _mm512_cvtsepi32_epi8(whole));
    }
    return most / 127.0F + _mm512_reduce_add_ps(poison);
}

// What an expert's tokens need, in blocks of 16, all of it in memory that the caller gave.
struct Scratch {
    uint8_t *tokens;      // [blocks][hidden bytes][16]
    uint8_t *inner;       // [blocks][width bytes][16]
    uint16_t *unrounded;  // int8: [blocks][width][16] inner values before they are rounded
    uint8_t *codes;       // int8: [16][hidden]
    float *token_scales;  // int8: [blocks][16]
    float *inner_scales;  // int8: [blocks][16]
    float *peaks;         // int8: [blocks][2][16] largest magnitudes of inner values, and zeros or NaN
};

template <typename Kind>
class Layer {
  public:
    Layer(const Expert *experts, int64_t hidden_size, int64_t width, uint8_t *memory)
        : experts_(experts), hidden_(hidden_size), width_(width) {
        const auto take = [&memory](int64_t num_bytes) {
            uint8_t *begin = memory;
            memory += (num_bytes + 63) / 64 * 64;
            return begin;
        };
        scratch_.tokens = take(kMostTokens * hidden_ * Kind::kBytes);
        scratch_.inner = take(kMostTokens * width_ * Kind::kBytes);
        scratch_.token_scales = reinterpret_cast<float *>(take(kMostTokens * 4));
        scratch_.inner_scales = reinterpret_cast<float *>(take(kMostTokens * 4));
        scratch_.peaks = reinterpret_cast<float *>(take(kMostTokens * 8));
        scratch_.codes = take(kTileRows * hidden_);
        scratch_.unrounded = reinterpret_cast<uint16_t *>(take(kMostTokens * width_ * 2));
    }

    // `tokens` and `outputs` [sum of counts, hidden], sorted by expert.
    REMUDA_AMX void run(const uint16_t *tokens, const int64_t *counts, int64_t num_experts, uint16_t *outputs) {
        FullTiles tiles;
        int64_t expert = next_used(counts, num_experts, 0);
        while (expert < num_experts) {
            const int64_t following = next_used(counts, num_experts, expert + 1);
            for (int64_t done = 0; done < counts[expert]; done += kMostTokens) {
                const int64_t n = std::min(kMostTokens, counts[expert] - done);
                const int64_t next = done + n < counts[expert] ? expert : following;
                const Rows rows = next < num_experts ? gate_up_rows(next, 0) : Rows{};
                compute(expert, tokens, static_cast<int>(n), outputs, next < num_experts ? &rows : nullptr);
                tokens += n * hidden_;
                outputs += n * hidden_;
            }
            expert = following;
        }
    }

  private:
    static int64_t next_used(const int64_t *counts, int64_t num_experts, int64_t expert) {
        while (expert < num_experts && counts[expert] == 0) expert++;
        return expert;
    }

    Rows gate_up_rows(int64_t expert, int64_t row) const {
        const uint8_t *gate = experts_[expert].gate_up + row * hidden_ * Kind::kBytes;
        return {gate, gate + width_ * hidden_ * Kind::kBytes, hidden_ * Kind::kBytes};
    }

    Rows down_rows(int64_t expert, int64_t row) const {
        const int64_t bytes = width_ * Kind::kBytes;
        const uint8_t *begin = experts_[expert].down + row * bytes;
        return {begin, begin + kTileRows * bytes, bytes};
    }

    REMUDA_AMX void compute(int64_t expert, const uint16_t *tokens, int num_tokens, uint16_t *outputs,
                            const Rows *after) {
        pack_tokens(tokens, num_tokens);
        for (int64_t row = 0; row < width_; row += kTileRows) {
            const bool is_last = row + kTileRows == width_;
            const Rows next = is_last ? down_rows(expert, 0) : gate_up_rows(expert, row + kTileRows);
            multiply_all(gate_up_rows(expert, row), scratch_.tokens, num_tokens, &next,
                         [&](int block, const int32_t *gate, const int32_t *up, Ahead &ahead) REMUDA_AMX {
                             store_inner(expert, row, block, gate, up, ahead);
                         });
        }
        if constexpr (Kind::kBytes == 1) round_inner(num_tokens);
        for (int64_t row = 0; row < hidden_; row += 2 * kTileRows) {
            const bool is_last = row + 2 * kTileRows == hidden_;
            const Rows next = is_last ? Rows{} : down_rows(expert, row + 2 * kTileRows);
            multiply_all(down_rows(expert, row), scratch_.inner, num_tokens, is_last ? after : &next,
                         [&](int block, const int32_t *low, const int32_t *high, Ahead &ahead) REMUDA_AMX {
                             store_output(expert, row, block, num_tokens, low, outputs, ahead);
                             store_output(expert, row + kTileRows, block, num_tokens, high, outputs, ahead);
                         });
        }
    }

    // Calls `store` with the sums of both 16 rows with each block of 16 tokens.
    template <typename Store>
    REMUDA_AMX void multiply_all(const Rows &rows, const uint8_t *tokens, int num_tokens, const Rows *next,
                                 const Store &store) {
        const int num_pairs = (num_tokens + kTokenPair - 1) / kTokenPair;
        Ahead ahead(next, rows.bytes / kTileBytes * num_pairs + (num_tokens + kTileRows - 1) / kTileRows * kTileRows);
        for (int token = 0; token < num_tokens; token += kTokenPair) {
            const uint8_t *block = tokens + token * rows.bytes;
            Sums sums;
            if (num_tokens - token > kTileRows) {
                multiply<Kind, true>(rows, block, ahead, sums);
                store(token / kTileRows, sums.tiles[0], sums.tiles[1], ahead);
                store(token / kTileRows + 1, sums.tiles[2], sums.tiles[3], ahead);
            } else {
                multiply<Kind, false>(rows, block, ahead, sums);
                store(token / kTileRows, sums.tiles[0], sums.tiles[1], ahead);
            }
        }
    }

    REMUDA_AMX void pack_tokens(const uint16_t *tokens, int num_tokens) {
        for (int token = 0; token < num_tokens; token += kTileRows, tokens += kTileRows * hidden_) {
            const int n = std::min(kTileRows, num_tokens - token);
            uint8_t *packed = scratch_.tokens + token * hidden_ * Kind::kBytes;
            if constexpr (Kind::kBytes == 2) {
                pack(reinterpret_cast<const uint8_t *>(tokens), n, hidden_ * 2, packed);
                continue;
            }
            std::memset(scratch_.token_scales + token, 0, kTileRows * sizeof(float));
            for (int t = 0; t < n; t++) {
                scratch_.token_scales[token + t] = quantize(tokens + t * hidden_, hidden_, scratch_.codes + t * hidden_);
            }
            pack(scratch_.codes, n, hidden_, packed);
            std::memset(scratch_.peaks + 2 * token, 0, 2 * kTileRows * sizeof(float));
        }
    }

    // Inner values of 16 rows and 16 tokens, from the sums of their gates and ups.
    REMUDA_AMX void store_inner(int64_t expert, int64_t row, int block, const int32_t *gate, const int32_t *up,
                                Ahead &ahead) {
        if constexpr (Kind::kBytes == 2) {
            uint8_t *to = scratch_.inner + (block * width_ + row) * kTileRows * 2;
            for (int r = 0; r < kTileRows; r += 2, to += kTileBytes) {
                ahead.step();
                ahead.step();
                const __m512i even = _mm512_cvtepu16_epi32(inner_values(gate, up, r));
                const __m512i odd = _mm512_cvtepu16_epi32(inner_values(gate, up, r + 1));
                _mm512_store_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
        } else {
            const float *gate_scales = experts_[expert].gate_up_scales + row, *up_scales = gate_scales + width_;
            const __m512 scales = _mm512_loadu_ps(scratch_.token_scales + block * kTileRows);
            uint16_t *to = scratch_.unrounded + (block * width_ + row) * kTileRows;
            float *peaks = scratch_.peaks + 2 * block * kTileRows;
            __m512 largest = _mm512_load_ps(peaks), poison = _mm512_load_ps(peaks + kTileRows);
            for (int r = 0; r < kTileRows; r++, to += kTileRows) {
                ahead.step();
                const __m256i values =
                    inner_values(gate, up, r, _mm512_mul_ps(_mm512_set1_ps(gate_scales[r]), scales),
                                 _mm512_mul_ps(_mm512_set1_ps(up_scales[r]), scales));
                see(widened(values), largest, poison);
                _mm256_store_si256(reinterpret_cast<__m256i *>(to), values);
            }
            _mm512_store_ps(peaks, largest);
            _mm512_store_ps(peaks + kTileRows, poison);
        }
    }

    REMUDA_AMX static __m256i inner_values(const int32_t *gate, const int32_t *up, int row) {
        const __m512 g = _mm512_load_ps(gate + row * kTileRows), u = _mm512_load_ps(up + row * kTileRows);
        return narrowed(swiglu(rounded(g), rounded(u)));
    }

    REMUDA_AMX static __m256i inner_values(const int32_t *gate, const int32_t *up, int row, __m512 gate_scales,
                                           __m512 up_scales) {
        const __m512 g = _mm512_cvtepi32_ps(_mm512_load_si512(gate + row * kTileRows));
        const __m512 u = _mm512_cvtepi32_ps(_mm512_load_si512(up + row * kTileRows));
        return narrowed(swiglu(rounded(_mm512_mul_ps(g, gate_scales)), rounded(_mm512_mul_ps(u, up_scales))));
    }

    // All rows of the inner values to int8.
    REMUDA_AMX void round_inner(int num_tokens) {
        for (int block = 0; block * kTileRows < num_tokens; block++) {
            const float *peaks = scratch_.peaks + 2 * block * kTileRows;
            const __m512 largest = _mm512_load_ps(peaks), poison = _mm512_load_ps(peaks + kTileRows);
            const __m512 scales = _mm512_add_ps(_mm512_div_ps(largest, _mm512_set1_ps(127.0F)), poison);
            _mm512_store_ps(scratch_.inner_scales + block * kTileRows, scales);
            const __mmask16 has_any = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ);
            const __m512 inverse = _mm512_maskz_div_ps(has_any, _mm512_set1_ps(127.0F), largest);
            const uint16_t *from = scratch_.unrounded + block * width_ * kTileRows;
            uint8_t *to = scratch_.inner + block * width_ * kTileRows;
            for (int64_t row = 0; row < width_; row += 4, to += kTileBytes) {
                __m512i words = _mm512_setzero_si512();
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++, from += kTileRows) {
                    const __m512 values = widened(_mm256_load_si256(reinterpret_cast<const __m256i *>(from)));
                    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
                    const __m512i byte = _mm512_and_si512(whole, _mm512_set1_epi32(255));
                    words = _mm512_or_si512(words, _mm512_slli_epi32(byte, 8 * r));
                }
                _mm512_store_si512(to, words);
            }
        }
    }

    // 16 outputs of up to 16 tokens.
    REMUDA_AMX void store_output(int64_t expert, int64_t row, int block, int num_tokens, const int32_t *sums,
                                 uint16_t *outputs, Ahead &ahead) {
        __m512i words[kTileRows];
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; r++) words[r] = _mm512_load_si512(sums + r * kTileRows);
        for (int i = 0; i < kTileRows / 2; i++) ahead.step();
        transpose(words);
        const int first = block * kTileRows, n = std::min(kTileRows, num_tokens - first);
        uint16_t *to = outputs + first * hidden_ + row;
        __m512 row_scales = _mm512_setzero_ps();
        if constexpr (Kind::kBytes == 1) row_scales = _mm512_loadu_ps(experts_[expert].down_scales + row);
        for (int t = 0; t < n; t++, to += hidden_) {
            __m512 values = Kind::as_float(words[t]);
            if constexpr (Kind::kBytes == 1) {
                const __m512 scale = _mm512_set1_ps(scratch_.inner_scales[first + t]);
                values = _mm512_mul_ps(values, _mm512_mul_ps(row_scales, scale));
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), narrowed(values));
        }
    }

    const Expert *experts_;
    int64_t hidden_, width_;
    Scratch scratch_;
};

}  // namespace

extern "C" {

// How many bytes of scratch, on a border of 64, the functions below need.
int64_t remuda_experts_scratch_bytes(int64_t hidden_size, int64_t width) {
    return kMostTokens * (2 * hidden_size + 3 * width + 16) + kTileRows * hidden_size + 7 * 64;
}

// outputs [n, hidden_size] of tokens [n, hidden_size], both bfloat16, sorted by expert: counts [num_experts] of each.
// `experts`: gate_up [2 × width, hidden_size], gate first, and down [hidden_size, width], all bfloat16. hidden_size and
// width are multiples of 32.
REMUDA_AMX void remuda_experts_bf16(const Expert *experts, int64_t num_experts, int64_t hidden_size, int64_t width,
                                    const uint16_t *tokens, const int64_t *counts, uint16_t *outputs,
                                    uint8_t *scratch) {
    Layer<Bf16>(experts, hidden_size, width, scratch).run(tokens, counts, num_experts, outputs);
}

// The same with int8 weights and float32 scales for each of their rows. hidden_size and width are multiples of 64. Tokens
// and inner values are rounded to int8 by their own largest magnitudes ÷ 127.
REMUDA_AMX void remuda_experts_int8(const Expert *experts, int64_t num_experts, int64_t hidden_size, int64_t width,
                                    const uint16_t *tokens, const int64_t *counts, uint16_t *outputs,
                                    uint8_t *scratch) {
    Layer<Int8>(experts, hidden_size, width, scratch).run(tokens, counts, num_experts, outputs);
}
}

#endif
