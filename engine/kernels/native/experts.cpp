// The routed experts of a layer on the CPU's tile unit: down(silu(gate(x)) · up(x)) of each expert's tokens, with
// weights in bfloat16 or in int8 with a scale for each row.
//
// Weights are the left operand, as they lie in the checkpoint, and are read once for up to kMostTokens tokens of an
// expert, in the order of memory across matrices and experts. What an expert's first product leaves in the tiles is
// already turned as its second one wants it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "overlap.h"
#include "swiglu.h"
#include "tiles.h"
#include "transpose.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int64_t kMostTokens = 256;       // so many that computing takes longer than reading the weights

struct Expert {
    const uint8_t *gate_up, *down;
    const float *gate_up_scales, *down_scales;  // of int8
};

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

// Adds to the largest magnitudes, by which numbers are rounded to int8. What is not finite goes to `poison`, which
// makes the scale NaN: no int8 could show it.
REMUDA_AMX inline void see(__m512 values, __m512 &largest, __m512 &poison) {
    largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
    poison = _mm512_fmadd_ps(values, _mm512_setzero_ps(), poison);
}

// Numbers that are all below 2⁻¹²⁰ have no finite factor: they are taken for zero.
REMUDA_AMX inline __m512 finite_or_zero(__m512 factors) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(factors, _mm512_set1_ps(INFINITY), _CMP_LT_OQ), factors);
}

// A token [num_inputs] to int8; its scale is returned.
REMUDA_AMX float quantize(const uint16_t *token, int64_t num_inputs, uint8_t *codes) {
    __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
    for (int64_t k = 0; k < num_inputs; k += 16) {
        see(widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(token + k))), largest, poison);
    }
    const float most = _mm512_reduce_max_ps(largest);
    const __m512 inverse = finite_or_zero(_mm512_set1_ps(127.0F / most));
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
        Finishing<StoreInner> inner(StoreInner{*this, experts_[expert]});
        for (int64_t row = 0; row < width_; row += kTileRows) {
            const bool is_last = row + kTileRows == width_;
            const Rows next = is_last ? down_rows(expert, 0) : gate_up_rows(expert, row + kTileRows);
            multiply_all(gate_up_rows(expert, row), scratch_.tokens, num_tokens, &next, row, inner);
        }
        finish_all(inner);
        if constexpr (Kind::kBytes == 1) round_inner(num_tokens);
        Finishing<StoreOutput> output(StoreOutput{*this, experts_[expert], num_tokens, outputs});
        for (int64_t row = 0; row < hidden_; row += 2 * kTileRows) {
            const bool is_last = row + 2 * kTileRows == hidden_;
            const Rows next = is_last ? Rows{} : down_rows(expert, row + 2 * kTileRows);
            multiply_all(down_rows(expert, row), scratch_.inner, num_tokens, is_last ? after : &next, row, output);
        }
        finish_all(output);
    }

    template <typename Task>
    REMUDA_AMX static void multiply_all(const Rows &rows, const uint8_t *tokens, int num_tokens, const Rows *next,
                                        int64_t row, Finishing<Task> &finishing) {
        const int num_pairs = (num_tokens + kTokenPair - 1) / kTokenPair;
        const int64_t num_steps = rows.bytes / kTileBytes;
        Ahead ahead(next, num_steps * num_pairs);
        for (int token = 0; token < num_tokens; token += kTokenPair) {
            const uint8_t *block = tokens + token * rows.bytes;
            const bool has_two = num_tokens - token > kTileRows;
            Sums &sums = finishing.next(row, token / kTileRows, has_two ? 2 : 1, num_steps);
            if (has_two) {
                multiply<Kind, true>(rows, block, ahead, finishing, sums);
            } else {
                multiply<Kind, false>(rows, block, ahead, finishing, sums);
            }
        }
    }

    template <typename Task>
    REMUDA_AMX static void finish_all(Finishing<Task> &finishing) {
        finishing.next(0, 0, 0, 1);
        finishing.finish();
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
                uint8_t *codes = scratch_.codes + t * hidden_;
                scratch_.token_scales[token + t] = quantize(tokens + t * hidden_, hidden_, codes);
            }
            pack(scratch_.codes, n, hidden_, packed);
            std::memset(scratch_.peaks + 2 * token, 0, 2 * kTileRows * sizeof(float));
        }
    }

    // Inner values of two rows and 16 tokens, from the sums of their gates and ups.
    struct StoreInner {
        static constexpr int kNum = kTileRows / 2;
        const Layer &layer;
        const Expert &expert;

        REMUDA_AMX void operator()(Sums &sums, int64_t first_row, int block_of_sums, int block, int task) const {
            const int32_t *gate = sums.of(block_of_sums, 0) + 2 * task * kTileRows;
            const int32_t *up = sums.of(block_of_sums, 1) + 2 * task * kTileRows;
            const int64_t row = first_row + 2 * task;
            const Scratch &scratch = layer.scratch_;
            const int64_t at = (block * layer.width_ + row) * kTileRows;
            if constexpr (Kind::kBytes == 2) {
                const __m512 one = _mm512_set1_ps(1.0F);
                const __m512i even = _mm512_cvtepu16_epi32(inner_values(gate, up, one, one));
                const __m512i odd = _mm512_cvtepu16_epi32(inner_values(gate + kTileRows, up + kTileRows, one, one));
                _mm512_store_si512(scratch.inner + at * 2, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
                return;
            }
            const float *gate_scales = expert.gate_up_scales + row, *up_scales = gate_scales + layer.width_;
            const __m512 scales = _mm512_load_ps(scratch.token_scales + block * kTileRows);
            float *peaks = scratch.peaks + 2 * block * kTileRows;
            __m512 largest = _mm512_load_ps(peaks), poison = _mm512_load_ps(peaks + kTileRows);
            for (int r = 0; r < 2; r++, gate += kTileRows, up += kTileRows) {
                const __m256i values =
                    inner_values(gate, up, _mm512_mul_ps(_mm512_set1_ps(gate_scales[r]), scales),
                                 _mm512_mul_ps(_mm512_set1_ps(up_scales[r]), scales));
                see(widened(values), largest, poison);
                _mm256_store_si256(reinterpret_cast<__m256i *>(scratch.unrounded + at + r * kTileRows), values);
            }
            _mm512_store_ps(peaks, largest);
            _mm512_store_ps(peaks + kTileRows, poison);
        }
    };

    REMUDA_AMX static __m256i inner_values(const int32_t *gate, const int32_t *up, __m512 gate_scales,
                                           __m512 up_scales) {
        __m512 g = Kind::as_float(_mm512_load_si512(gate)), u = Kind::as_float(_mm512_load_si512(up));
        if constexpr (Kind::kBytes == 1) {
            g = _mm512_mul_ps(g, gate_scales);
            u = _mm512_mul_ps(u, up_scales);
        }
        return narrowed(swiglu(rounded(g), rounded(u)));
    }

    // All rows of the inner values to int8.
    REMUDA_AMX void round_inner(int num_tokens) {
        for (int block = 0; block * kTileRows < num_tokens; block++) {
            const float *peaks = scratch_.peaks + 2 * block * kTileRows;
            const __m512 largest = _mm512_load_ps(peaks), poison = _mm512_load_ps(peaks + kTileRows);
            const __m512 scales = _mm512_add_ps(_mm512_div_ps(largest, _mm512_set1_ps(127.0F)), poison);
            _mm512_store_ps(scratch_.inner_scales + block * kTileRows, scales);
            const __m512 inverse = finite_or_zero(_mm512_div_ps(_mm512_set1_ps(127.0F), largest));
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

    // Of 16 outputs and 16 tokens: turns them, then stores them for kAtOnce tokens at a time.
    struct StoreOutput {
        static constexpr int kAtOnce = 4, kOfHalf = 1 + kTileRows / kAtOnce, kNum = 2 * kOfHalf;
        const Layer &layer;
        const Expert &expert;
        int num_tokens;
        uint16_t *outputs;

        REMUDA_AMX void operator()(Sums &sums, int64_t first_row, int block_of_sums, int block, int task) const {
            int32_t *words = sums.of(block_of_sums, task / kOfHalf);
            const int64_t row = first_row + task / kOfHalf * kTileRows;
            if (task % kOfHalf == 0) {
                turn(words);
                return;
            }
            const int first = (task % kOfHalf - 1) * kAtOnce;
            const int last = std::min(first + kAtOnce, num_tokens - block * kTileRows);
            for (int t = first; t < last; t++) {
                const int64_t token = block * kTileRows + t;
                __m512 values = Kind::as_float(_mm512_load_si512(words + t * kTileRows));
                if constexpr (Kind::kBytes == 1) {
                    const __m512 scale = _mm512_set1_ps(layer.scratch_.inner_scales[token]);
                    values = _mm512_mul_ps(values, _mm512_mul_ps(_mm512_loadu_ps(expert.down_scales + row), scale));
                }
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(outputs + token * layer.hidden_ + row),
                                    narrowed(values));
            }
        }

        REMUDA_AMX static void turn(int32_t *words) {
            __m512i rows[kTileRows];
#pragma GCC unroll 16
            for (int r = 0; r < kTileRows; r++) rows[r] = _mm512_load_si512(words + r * kTileRows);
            transpose(rows);
#pragma GCC unroll 16
            for (int r = 0; r < kTileRows; r++) _mm512_store_si512(words + r * kTileRows, rows[r]);
        }
    };

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
// `experts`: gate_up [2 × width, hidden_size], gate first, and down [hidden_size, width], all bfloat16. hidden_size
// and width are multiples of 32.
REMUDA_AMX void remuda_experts_bf16(const Expert *experts, int64_t num_experts, int64_t hidden_size, int64_t width,
                                    const uint16_t *tokens, const int64_t *counts, uint16_t *outputs,
                                    uint8_t *scratch) {
    Layer<Bf16Tiles>(experts, hidden_size, width, scratch).run(tokens, counts, num_experts, outputs);
}

// The same with int8 weights and float32 scales for each of their rows. hidden_size and width are multiples of 64.
// Tokens and inner values are rounded to int8 by their own largest magnitudes ÷ 127.
REMUDA_AMX void remuda_experts_int8(const Expert *experts, int64_t num_experts, int64_t hidden_size, int64_t width,
                                    const uint16_t *tokens, const int64_t *counts, uint16_t *outputs,
                                    uint8_t *scratch) {
    Layer<Int8Tiles>(experts, hidden_size, width, scratch).run(tokens, counts, num_experts, outputs);
}
}

#endif
