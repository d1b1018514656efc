// How each format of quantized weights becomes bfloat16, 32 weights of a row at a time. Only where REMUDA_TILES is
// defined.
//
// A format is a class made for one row. `enter(group)` prepares for a group of the row, whose weights have their scale
// in common; `unit(i)` is then the row's weights 32 i to 32 i + 31, in order. Where kGroupUnits, the units of a group, is
// not 0, `i` counts from the group's beginning. Each weight is computed in float32 and rounded once, to nearest. Four-
// and five-bit codes have so few values that a group's are computed once and then looked up.
#pragma once

#include <cstdint>
#include <cstring>

#include "tiles.h"

#ifdef REMUDA_TILES

namespace remuda {

constexpr int64_t kUnit = 32;  // weights

enum class ScaleType : int32_t { kFloat32, kBfloat16, kFloat16 };

// A matrix [num_outputs, num_inputs]; the same fields as _Matrix in engine/kernels/encoded_linear.py.
struct Encoded {
    const uint8_t *codes;         // rows of row_bytes
    const uint8_t *scales;        // [rows of scales, num_groups]; null in formats without
    const uint8_t *zeros;         // [num_outputs, num_groups]; null: 8
    const float *output_scales;   // [num_outputs], by which the outputs are multiplied; null: none
    int64_t num_outputs, num_inputs, row_bytes, num_groups;
    int64_t group_units;          // how many units a group has
    int64_t rows_per_scale;       // how many rows share a row of `scales`
    int32_t format;
    ScaleType scale_type;
};

REMUDA_AMX inline float half_at(const uint8_t *bytes) {
    uint16_t bits;
    std::memcpy(&bits, bytes, 2);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

// A row's scales.
struct Scales {
    const uint8_t *bytes;
    ScaleType type;

    Scales() = default;
    Scales(const Encoded &m, int64_t row) : bytes(m.scales), type(m.scale_type) {
        const int64_t width = type == ScaleType::kFloat32 ? 4 : 2;
        bytes += row / m.rows_per_scale * m.num_groups * width;
    }
    REMUDA_AMX float of(int64_t group) const {
        if (type == ScaleType::kFloat16) return half_at(bytes + group * 2);
        uint32_t bits = 0;
        if (type == ScaleType::kFloat32) {
            std::memcpy(&bits, bytes + group * 4, 4);
        } else {
            std::memcpy(reinterpret_cast<uint8_t *>(&bits) + 2, bytes + group * 2, 2);
        }
        float scale;
        std::memcpy(&scale, &bits, 4);
        return scale;
    }
};

REMUDA_AMX inline __m128i load16(const uint8_t *bytes) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes));
}
REMUDA_AMX inline __m256i load32(const uint8_t *bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
}
REMUDA_AMX inline __m512i as_bf16(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}
REMUDA_AMX inline __m512 from_int8(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }
REMUDA_AMX inline __m512 zero_to_15() {
    return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

// A table of 16 values, twice: _mm512_permutexvar_epi16 by any 16 bits then finds the value of the lowest four.
REMUDA_AMX inline __m512i table_of_16(__m512 values) {
    return as_bf16(values, values);
}

// float8 e4m3, finite, without scales.
class Float8 {
  public:
    static constexpr int kGroupUnits = 0;
    Float8() = default;
    REMUDA_AMX Float8(const Encoded &m, int64_t row) : codes_(m.codes + row * m.row_bytes) {}
    REMUDA_AMX void enter(int64_t) {}
    REMUDA_AMX __m512i unit(int64_t i) const {
        const __m512i codes = _mm512_cvtepi8_epi16(load32(codes_ + i * kUnit));
        // Exponent and mantissa where bfloat16 has them; its exponents are greater by 120. The seven subnormal numbers,
        // of 2⁻⁹ each, are looked up.
        __m512i numbers = _mm512_and_si512(_mm512_slli_epi16(codes, 4), _mm512_set1_epi16(0x07F0));
        numbers = _mm512_add_epi16(numbers, _mm512_set1_epi16(120 << 7));
        const __m512i subnormal = table_of_16(_mm512_mul_ps(zero_to_15(), _mm512_set1_ps(0x1p-9F)));
        const __mmask32 is_subnormal = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x78));
        numbers = _mm512_mask_permutexvar_epi16(numbers, is_subnormal, codes, subnormal);
        return _mm512_or_si512(numbers, _mm512_and_si512(codes, _mm512_set1_epi16(INT16_MIN)));
    }

  private:
    const uint8_t *codes_;
};

// float8 e4m3, finite, with float32 scales.
class ScaledFloat8 {
  public:
    static constexpr int kGroupUnits = 0;
    ScaledFloat8() = default;
    REMUDA_AMX ScaledFloat8(const Encoded &m, int64_t row) : codes_(m.codes + row * m.row_bytes), scales_(m, row) {}
    REMUDA_AMX void enter(int64_t group) { scale_ = _mm512_set1_ps(scales_.of(group) * 256.0F); }
    REMUDA_AMX __m512i unit(int64_t i) const {
        // As float16 the same bits mean 2⁻⁸ of the value, of subnormal numbers too.
        __m512i bits = _mm512_slli_epi16(_mm512_cvtepi8_epi16(load32(codes_ + i * kUnit)), 7);
        bits = _mm512_and_si512(bits, _mm512_set1_epi16(static_cast<int16_t>(0xBF80)));
        return as_bf16(_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), scale_),
                       _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), scale_));
    }

  private:
    const uint8_t *codes_;
    Scales scales_;
    __m512 scale_;
};

class Int8 {
  public:
    static constexpr int kGroupUnits = 0;
    Int8() = default;
    REMUDA_AMX Int8(const Encoded &m, int64_t row) : codes_(m.codes + row * m.row_bytes) {}
    REMUDA_AMX void enter(int64_t) {}
    REMUDA_AMX __m512i unit(int64_t i) const {
        const uint8_t *codes = codes_ + i * kUnit;
        return as_bf16(from_int8(load16(codes)), from_int8(load16(codes + 16)));
    }

  private:
    const uint8_t *codes_;
};

// Two codes to a byte, the first in the low half; weight = (code − zero) · scale.
class Int4 {
  public:
    static constexpr int kGroupUnits = 0;
    Int4() = default;
    REMUDA_AMX Int4(const Encoded &m, int64_t row)
        : codes_(m.codes + row * m.row_bytes),
          zeros_(m.zeros ? m.zeros + row * m.num_groups : nullptr),
          scales_(m, row) {}
    REMUDA_AMX void enter(int64_t group) {
        const __m512 zero = _mm512_set1_ps(zeros_ ? zeros_[group] : 8.0F);
        table_ = table_of_16(_mm512_mul_ps(_mm512_sub_ps(zero_to_15(), zero), _mm512_set1_ps(scales_.of(group))));
    }
    REMUDA_AMX __m512i unit(int64_t i) const {
        const __m512i bytes = _mm512_cvtepu8_epi32(load16(codes_ + i * kUnit / 2));
        return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table_);
    }

  private:
    const uint8_t *codes_, *zeros_;
    Scales scales_;
    __m512i table_;
};

// Two codes to a byte, the first in the high half; weight = value of the code · scale.
class Nf4 {
  public:
    static constexpr int kGroupUnits = 0;
    Nf4() = default;
    REMUDA_AMX Nf4(const Encoded &m, int64_t row) : codes_(m.codes + row * m.row_bytes), scales_(m, row) {}
    REMUDA_AMX void enter(int64_t group) {
        const __m512 values = _mm512_set_ps(
            1.0F, 0.7229568362236023F, 0.5626170039176941F, 0.44070982933044434F, 0.33791524171829224F,
            0.24611230194568634F, 0.16093020141124725F, 0.07958029955625534F, 0.0F, -0.09105003625154495F,
            -0.18477343022823334F, -0.28444138169288635F, -0.39491748809814453F, -0.5250730514526367F,
            -0.6961928009986877F, -1.0F);
        table_ = table_of_16(_mm512_mul_ps(values, _mm512_set1_ps(scales_.of(group))));
    }
    REMUDA_AMX __m512i unit(int64_t i) const {
        const __m512i bytes = _mm512_cvtepu8_epi32(load16(codes_ + i * kUnit / 2));
        const __m512i both = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        return _mm512_permutexvar_epi16(both, table_);
    }

  private:
    const uint8_t *codes_;
    Scales scales_;
    __m512i table_;
};

// The rest are ggml's blocks, which hold their scales: a group is a block (engine/quantization/gguf_blocks.py).

class Q8_0 {
  public:
    static constexpr int kGroupUnits = 1;
    Q8_0() = default;
    REMUDA_AMX Q8_0(const Encoded &m, int64_t row) : blocks_(m.codes + row * m.row_bytes) {}
    REMUDA_AMX void enter(int64_t group) { block_ = blocks_ + group * 34; }
    REMUDA_AMX __m512i unit(int64_t) const {
        const __m512 scale = _mm512_set1_ps(half_at(block_));
        return as_bf16(_mm512_mul_ps(from_int8(load16(block_ + 2)), scale),
                       _mm512_mul_ps(from_int8(load16(block_ + 18)), scale));
    }

  private:
    const uint8_t *blocks_, *block_;
};

class Q4_0 {
  public:
    static constexpr int kGroupUnits = 1;
    Q4_0() = default;
    REMUDA_AMX Q4_0(const Encoded &m, int64_t row) : blocks_(m.codes + row * m.row_bytes) {}
    REMUDA_AMX void enter(int64_t group) { block_ = blocks_ + group * 18; }
    REMUDA_AMX __m512i unit(int64_t) const {
        const __m512 codes = _mm512_sub_ps(zero_to_15(), _mm512_set1_ps(8.0F));
        const __m512i table = table_of_16(_mm512_mul_ps(codes, _mm512_set1_ps(half_at(block_))));
        const __m256i low = _mm256_cvtepu8_epi16(load16(block_ + 2));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
        return _mm512_permutexvar_epi16(both, table);
    }

  private:
    const uint8_t *blocks_, *block_;
};

// What Q4_K and Q5_K have in common: weight = scale · code − minimum, by sub-blocks of a unit each.
class KScales {
  public:
    REMUDA_AMX void read(const uint8_t *block) {
        uint32_t first, second, third;
        std::memcpy(&first, block + 4, 4);
        std::memcpy(&second, block + 8, 4);
        std::memcpy(&third, block + 12, 4);
        const uint32_t six_bits = 0x3F3F3F3F, four_bits = 0x0F0F0F0F, two_bits = 0x30303030;
        fill(scales_, first & six_bits, (third & four_bits) | ((first >> 2) & two_bits), half_at(block));
        fill(minima_, second & six_bits, ((third >> 4) & four_bits) | ((second >> 2) & two_bits), half_at(block + 2));
    }
    REMUDA_AMX __m512 weights(int sub_block, __m512 codes) const {
        // The product is exact, so that nothing changes by its not being rounded.
        return _mm512_fmsub_ps(codes, _mm512_set1_ps(scales_[sub_block]), _mm512_set1_ps(minima_[sub_block]));
    }

  private:
    REMUDA_AMX static void fill(float *to, uint32_t low, uint32_t high, float factor) {
        const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low));
        const __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        _mm256_storeu_ps(to, _mm256_mul_ps(numbers, _mm256_set1_ps(factor)));
    }
    float scales_[8], minima_[8];
};

class Q4K {
  public:
    static constexpr int kGroupUnits = 8;
    Q4K() = default;
    REMUDA_AMX Q4K(const Encoded &m, int64_t row) : blocks_(m.codes + row * m.row_bytes) {}
    REMUDA_AMX void enter(int64_t group) {
        block_ = blocks_ + group * 144;
        scales_.read(block_);
    }
    REMUDA_AMX __m512i unit(int sub_block) const {
        const __m512i bytes = _mm512_cvtepu8_epi16(load32(block_ + 16 + sub_block / 2 * 32));
        // One table for two sub-blocks, whose codes stand in the same bytes; the fifth bit of an index says which.
        const int even = sub_block & ~1;
        const __m512i table = as_bf16(scales_.weights(even, zero_to_15()), scales_.weights(even + 1, zero_to_15()));
        const __m512i codes = sub_block == even ? _mm512_and_si512(bytes, _mm512_set1_epi16(15))
                                                : _mm512_or_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi16(16));
        return _mm512_permutexvar_epi16(codes, table);
    }

  private:
    const uint8_t *blocks_, *block_;
    KScales scales_;
};

class Q5K {
  public:
    static constexpr int kGroupUnits = 8;
    Q5K() = default;
    REMUDA_AMX Q5K(const Encoded &m, int64_t row) : blocks_(m.codes + row * m.row_bytes) {}
    REMUDA_AMX void enter(int64_t group) {
        block_ = blocks_ + group * 176;
        scales_.read(block_);
    }
    REMUDA_AMX __m512i unit(int sub_block) const {
        const __m512i both = _mm512_cvtepu8_epi16(load32(block_ + 48 + sub_block / 2 * 32));
        const __m512i low = _mm512_srli_epi16(both, sub_block % 2 * 4);
        const __m512i high = _mm512_srli_epi16(_mm512_cvtepu8_epi16(load32(block_ + 16)), sub_block);
        // The index has five bits; low's four and, above them, high's lowest.
        const __m512i codes = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, _mm512_slli_epi16(high, 4), 0xCA);
        const __m512 upper = _mm512_add_ps(zero_to_15(), _mm512_set1_ps(16.0F));
        return _mm512_permutexvar_epi16(
            codes, as_bf16(scales_.weights(sub_block, zero_to_15()), scales_.weights(sub_block, upper)));
    }

  private:
    const uint8_t *blocks_, *block_;
    KScales scales_;
};

class Q6K {
  public:
    static constexpr int kGroupUnits = 8;
    Q6K() = default;
    REMUDA_AMX Q6K(const Encoded &m, int64_t row) : blocks_(m.codes + row * m.row_bytes) {}
    REMUDA_AMX void enter(int64_t group) {
        block_ = blocks_ + group * 210;
        const __m512 scale = _mm512_set1_ps(half_at(block_ + 208));
        _mm512_storeu_ps(scales_, _mm512_mul_ps(from_int8(load16(block_ + 192)), scale));
    }
    REMUDA_AMX __m512i unit(int i) const {
        // Half a block has 64 bytes of low bits and 32 of high bits for its four units.
        const int half = i / 4, quarter = i % 4;
        __m256i low = load32(block_ + half * 64 + quarter % 2 * 32);
        low = _mm256_and_si256(_mm256_srli_epi16(low, quarter / 2 * 4), _mm256_set1_epi8(15));
        __m256i high = _mm256_srli_epi16(load32(block_ + 128 + half * 32), quarter * 2);
        high = _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(3)), 4);
        const __m256i codes = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
        const float *scales = scales_ + i * 2;
        return as_bf16(_mm512_mul_ps(from_int8(_mm256_castsi256_si128(codes)), _mm512_set1_ps(scales[0])),
                       _mm512_mul_ps(from_int8(_mm256_extracti128_si256(codes, 1)), _mm512_set1_ps(scales[1])));
    }

  private:
    const uint8_t *blocks_, *block_;
    float scales_[16];
};

}  // namespace remuda

#endif
