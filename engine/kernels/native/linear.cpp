// y = x Wᵀ in bfloat16 for few tokens, with Intel's tile unit (AMX). W [out, in] stays as it lies in the checkpoint: rows
// of W are the left operand, 16 at a time, so that nothing is packed beside the few tokens. Each weight is read once from
// memory, whatever the number of tokens (up to kMostTokens): a block of rows stays in the second-level cache meanwhile.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REMUDA_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;      // bfloat16 values in 64 bytes, a row of a tile
constexpr int kRowTiles = 2;        // tiles of weights that are computed together
constexpr int kMostTokens = 512;
constexpr int kAhead = 8;           // steps of kTileDepth by which weights are fetched ahead

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles 0-3: sums [16 rows of W, 16 tokens]; 4, 5: weights; 6, 7: tokens.
TileConfig full_tiles() {
    TileConfig config;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = kTileRows;
    }
    return config;
}

bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    static const bool allowed = [] {
        unsigned a, b, c, d;
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        bool has_amx = (d >> 22 & 1) && (d >> 24 & 1);
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
        bool has_bf16 = a >> 5 & 1;
        return has_amx && has_bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return allowed;
}

// Tokens [n, in] to [in / 2][16][2], as the right operand of the tile unit wants it; absent tokens are zero.
REMUDA_AMX void pack_tokens(const uint16_t *tokens, int64_t num_inputs, int n, uint16_t *packed) {
    auto *pairs = reinterpret_cast<uint32_t *>(packed);
    for (int64_t k = 0; k < num_inputs / 2; k++) {
        for (int t = 0; t < kTileRows; t++) {
            uint32_t pair = 0;
            if (t < n) std::memcpy(&pair, tokens + t * num_inputs + 2 * k, 4);
            pairs[k * kTileRows + t] = pair;
        }
    }
}

// sums [16 rows of W][16 tokens] to output [token][row], as bfloat16.
REMUDA_AMX void store(const float *sums, int num_tokens, int64_t num_outputs, uint16_t *output) {
    const __m512i stride = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kTileRows));
    for (int t = 0; t < num_tokens; t++) {
        __m512 column = _mm512_i32gather_ps(stride, sums + t, 4);
        __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(column));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(output + t * num_outputs), narrow);
    }
}

struct Work {
    const uint16_t *weights;
    const uint16_t *packed;  // blocks of 16 tokens
    uint16_t *output;
    int64_t num_inputs;
    int64_t num_outputs;
    int num_tokens;
};

REMUDA_AMX void prefetch_rows(const uint16_t *weights, int64_t stride) {
    for (int row = 0; row < kRowTiles * kTileRows; row++) {
        _mm_prefetch(reinterpret_cast<const char *>(weights + row * stride), _MM_HINT_T0);
    }
}

// 32 rows of W by one or two blocks of 16 tokens.
REMUDA_AMX void multiply(const Work &work, int64_t row, int token, bool is_first) {
    const int64_t depth = work.num_inputs;
    const uint16_t *weights = work.weights + row * depth;
    const uint16_t *left = work.packed + static_cast<int64_t>(token) * depth;
    const uint16_t *right = left + kTileRows * depth;
    const bool has_two = work.num_tokens - token > kTileRows;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileDepth) {
        if (is_first) prefetch_rows(weights + k + kAhead * kTileDepth, depth);
        _tile_loadd(4, weights + k, depth * 2);
        _tile_loadd(5, weights + kTileRows * depth + k, depth * 2);
        _tile_loadd(6, left + k * kTileRows, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (has_two) {
            _tile_loadd(7, right + k * kTileRows, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[kTileRows * kTileRows];
    const int n = work.num_tokens - token < kTileRows ? work.num_tokens - token : kTileRows;
    uint16_t *output = work.output + token * work.num_outputs + row;
    _tile_stored(0, sums, 64);
    store(sums, n, work.num_outputs, output);
    _tile_stored(1, sums, 64);
    store(sums, n, work.num_outputs, output + kTileRows);
    if (has_two) {
        const int m = work.num_tokens - token - kTileRows < kTileRows ? work.num_tokens - token - kTileRows : kTileRows;
        output += kTileRows * work.num_outputs;
        _tile_stored(2, sums, 64);
        store(sums, m, work.num_outputs, output);
        _tile_stored(3, sums, 64);
        store(sums, m, work.num_outputs, output + kTileRows);
    }
}

REMUDA_AMX void multiply_all(const Work &work) {
    // Others (oneDNN) rely on the configuration that they left.
    TileConfig former, ours = full_tiles();
    _tile_storeconfig(&former);
    _tile_loadconfig(&ours);
    for (int64_t row = 0; row < work.num_outputs; row += kRowTiles * kTileRows) {
        for (int token = 0; token < work.num_tokens; token += 2 * kTileRows) {
            multiply(work, row, token, token == 0);
        }
    }
    if (former.palette == 0) {
        _tile_release();
    } else {
        _tile_loadconfig(&former);
    }
}

}  // namespace

extern "C" {

int32_t remuda_has_tiles() { return may_use_tiles() ? 1 : 0; }

int32_t remuda_linear_most_tokens() { return kMostTokens; }

// output [num_tokens, num_outputs] = tokens [num_tokens, num_inputs] × weightsᵀ, all bfloat16 and contiguous.
// num_outputs and num_inputs are multiples of 32; `scratch` holds num_tokens rounded up to 32, × num_inputs values.
void remuda_linear_bf16(const uint16_t *weights, const uint16_t *tokens, uint16_t *output, uint16_t *scratch,
                        int64_t num_tokens, int64_t num_inputs, int64_t num_outputs) {
    for (int64_t token = 0; token < num_tokens; token += kTileRows) {
        int n = num_tokens - token < kTileRows ? num_tokens - token : kTileRows;
        pack_tokens(tokens + token * num_inputs, num_inputs, n, scratch + token * num_inputs);
    }
    multiply_all(Work{weights, scratch, output, num_inputs, num_outputs, static_cast<int>(num_tokens)});
}
}

#else

extern "C" {
int32_t remuda_has_tiles() { return 0; }
int32_t remuda_linear_most_tokens() { return 0; }
void remuda_linear_bf16(const uint16_t *, const uint16_t *, uint16_t *, uint16_t *, int64_t, int64_t, int64_t) {}
}

#endif
