// What stands between the product of queries, keys and values and attention: queries and keys are turned (rotary
// embedding), keys and values go to their places in the paged cache, in one pass and in bfloat16.

#include <cstdint>
#include <cstring>

#include "swiglu.h"
#include "tiles.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

// Heads of one token. Element 2i turns with 2i + 1, in float32.
REMUDA_AMX void turn_pairs(const uint16_t *input, uint16_t *output, int64_t num_heads, int64_t head_dim,
                           const float *cosines, const float *sines) {
    for (int64_t head = 0; head < num_heads; head++, input += head_dim, output += head_dim) {
        for (int64_t i = 0; i < head_dim / 2; i += 16) {
            const __m512 c = _mm512_loadu_ps(cosines + i), s = _mm512_loadu_ps(sines + i);
            const __m512i pairs = _mm512_loadu_si512(input + 2 * i);
            const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
            const __m256i left = narrowed(_mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
            const __m256i right = narrowed(_mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(right), 16);
            _mm512_storeu_si512(output + 2 * i, _mm512_or_si512(_mm512_cvtepu16_epi32(left), high));
        }
    }
}

// Heads of one token. Element i turns with i + head_dim / 2, in float32; cosines null: nothing turns.
REMUDA_AMX void turn(const uint16_t *input, uint16_t *output, int64_t num_heads, int64_t head_dim, const float *cosines,
                     const float *sines, bool interleaved) {
    const auto load = [](const uint16_t *values) __attribute__((target("avx512f,avx512bw,avx512vl"))) {
        return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)));
    };
    if (!cosines) {
        std::memcpy(output, input, num_heads * head_dim * sizeof *input);
        return;
    }
    if (interleaved) return turn_pairs(input, output, num_heads, head_dim, cosines, sines);
    const int64_t half = head_dim / 2;
    for (int64_t head = 0; head < num_heads; head++, input += head_dim, output += head_dim) {
        for (int64_t i = 0; i < half; i += 16) {
            const __m512 c = _mm512_loadu_ps(cosines + i), s = _mm512_loadu_ps(sines + i);
            const __m512 first = load(input + i), second = load(input + half + i);
            const __m512 left = _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s));
            const __m512 right = _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(output + i), narrowed(left));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(output + half + i), narrowed(right));
        }
    }
}

}  // namespace

extern "C" {

// Tokens' query, key and value: rows of heads × head_dim, each a stride apart. turned: queries, contiguous. key_cache,
// value_cache: rows of num_kv_heads × head_dim, to whose row slots[t] token t's go. cosines and sines float32 [tokens,
// head_dim / 2], or null. interleaved: element 2i turns with 2i + 1, else i with i + head_dim / 2. head_dim: a multiple of
// 32.
REMUDA_AMX void remuda_rotate_and_write(const uint16_t *query, int64_t query_stride, const uint16_t *key,
                                        int64_t key_stride, const uint16_t *value, int64_t value_stride,
                                        const float *cosines, const float *sines, const int64_t *slots, uint16_t *turned,
                                        uint16_t *key_cache, uint16_t *value_cache, int64_t num_tokens,
                                        int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                        int64_t interleaved) {
    const int64_t row = num_kv_heads * head_dim;
    for (int64_t t = 0; t < num_tokens; t++) {
        const float *c = cosines ? cosines + t * head_dim / 2 : nullptr, *s = sines ? sines + t * head_dim / 2 : nullptr;
        turn(query + t * query_stride, turned + t * num_heads * head_dim, num_heads, head_dim, c, s, interleaved);
        turn(key + t * key_stride, key_cache + slots[t] * row, num_kv_heads, head_dim, c, s, interleaved);
        std::memcpy(value_cache + slots[t] * row, value + t * value_stride, row * sizeof *value);
    }
}

// Rotary embedding: element 2i turns with 2i + 1. input: rows of num_heads × head_dim, row_stride apart; output
// contiguous; cosines and sines float32 [rows, head_dim / 2].
REMUDA_AMX void remuda_rotate_pairs(const uint16_t *input, int64_t row_stride, const float *cosines, const float *sines,
                                    uint16_t *output, int64_t num_rows, int64_t num_heads, int64_t head_dim) {
    for (int64_t row = 0; row < num_rows; row++) {
        turn_pairs(input + row * row_stride, output + row * num_heads * head_dim, num_heads, head_dim,
                   cosines + row * head_dim / 2, sines + row * head_dim / 2);
    }
}
}

#endif
