// y = x Wᵀ on the CPU's tile unit, with W in a quantized format and x in bfloat16.
//
// Pieces of 32 rows by 256 columns are decoded to bfloat16 where the first-level cache holds them, in the order of
// tiles, and multiplied at once by all tokens. So W is read from memory as it is, and once.

#include <algorithm>
#include <cstdint>

#include "encoded.h"
#include "token_tiles.h"

#ifdef REMUDA_TILES

namespace {

using namespace remuda;

constexpr int kRows = 2 * kTileRows;  // of a piece
// Units of 32 columns of a piece: so few that the CPU, which runs ahead, decodes the next ones during a product.
constexpr int64_t kPieceUnits = 8;
constexpr int64_t kUnitBytes = kRows * kTileBytes;
constexpr int kTokenBlock = 2 * kTileRows;  // tokens that are multiplied together
constexpr int kMostTokens = 128;
constexpr int kTileSums = kTileRows * kTileRows;

// Of 32 rows and 32 tokens: rows 0–15 with tokens 0–15, rows 16–31 with these, and both with tokens 16–31.
struct alignas(64) Sums {
    int32_t tiles[4][kTileSums];
};

struct Work {
    const Encoded &matrix;
    Packed tokens;
    uint16_t *output;
    int num_tokens;
};

REMUDA_AMX inline void prefetch(const uint8_t *begin, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += 64) _mm_prefetch(reinterpret_cast<const char *>(begin + i), _MM_HINT_T1);
}

// Units `first` to `last` of one row, the first of which is in `group`, to every `stride` bytes from `to`.
template <typename Format>
REMUDA_AMX inline void decode_row(Format format, int64_t group_units, int64_t group, int64_t first, int64_t last,
                                  uint8_t *to, int64_t stride) {
    if constexpr (Format::kGroupUnits > 0) {  // a piece holds whole groups
        for (int64_t unit = first; unit < last; unit += Format::kGroupUnits) {
            format.enter(unit / Format::kGroupUnits);
#pragma GCC unroll 8
            for (int i = 0; i < Format::kGroupUnits; i++, to += stride) _mm512_storeu_si512(to, format.unit(i));
        }
    } else {
        for (int64_t unit = first; unit < last; group++) {
            format.enter(group);
            const int64_t end = std::min(last, (group + 1) * group_units);
            for (; unit < end; unit++, to += stride) _mm512_storeu_si512(to, format.unit(unit));
        }
    }
}

template <typename Format>
REMUDA_AMX void decode_piece(const Encoded &matrix, const Format *rows, int64_t row, int64_t first, int64_t last,
                             uint8_t *piece) {
    // Meanwhile the next piece is fetched: further along these rows, or at the beginning of the next ones.
    const int64_t num_units = matrix.num_inputs / kUnit;
    const int64_t piece_bytes = matrix.row_bytes * kPieceUnits / num_units;
    const int64_t bytes_before = last < num_units ? matrix.row_bytes * last / num_units : kRows * matrix.row_bytes;
    const uint8_t *next = matrix.codes + row * matrix.row_bytes + bytes_before;
    const int64_t group = first / matrix.group_units;
    for (int r = 0; r < kRows; r++, next += matrix.row_bytes) {
        prefetch(next, piece_bytes);
        decode_row<Format>(rows[r], matrix.group_units, group, first, last, piece + r * kTileBytes, kUnitBytes);
    }
}

REMUDA_AMX inline void load_sums(const Sums &sums) {
    finish_writes();
    _tile_loadd(0, sums.tiles[0], kTileBytes);
    _tile_loadd(1, sums.tiles[1], kTileBytes);
    _tile_loadd(2, sums.tiles[2], kTileBytes);
    _tile_loadd(3, sums.tiles[3], kTileBytes);
}

REMUDA_AMX inline void save_sums(Sums &sums) {
    _tile_stored(0, sums.tiles[0], kTileBytes);
    _tile_stored(1, sums.tiles[1], kTileBytes);
    _tile_stored(2, sums.tiles[2], kTileBytes);
    _tile_stored(3, sums.tiles[3], kTileBytes);
    finish_writes();
}

// Adds to the sums in tiles 0 to 3 what units `first` to `last`, decoded, give with the tokens from `token`.
REMUDA_AMX inline void multiply(const Work &work, const uint8_t *piece, int64_t first, int64_t last, int token) {
    const uint8_t *left = work.tokens.block(token), *right = left + kTileRows * work.tokens.token_bytes;
    const bool has_two = work.num_tokens - token > kTileRows;
    finish_writes();
    for (int64_t unit = first; unit < last; unit++, piece += kUnitBytes) {
        _tile_loadd(4, piece, kTileBytes);
        _tile_loadd(5, piece + kTileRows * kTileBytes, kTileBytes);
        _tile_loadd(6, left + unit * kTileBytes * kTileRows, kTileBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (has_two) {
            _tile_loadd(7, right + unit * kTileBytes * kTileRows, kTileBytes);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

REMUDA_AMX void store(const Work &work, int64_t row, const Sums *sums) {
    for (int half = 0; half < 2; half++, row += kTileRows) {
        const float *scales = work.matrix.output_scales;
        const __m512 row_scales = scales ? _mm512_loadu_ps(scales + row) : _mm512_set1_ps(1.0F);
        for (int token = 0; token < work.num_tokens; token++) {
            const int32_t *tile = sums[token / kTokenBlock].tiles[token % kTokenBlock / kTileRows * 2 + half];
            const __m512 values = _mm512_castsi512_ps(column(tile, token % kTileRows));
            store_bf16(work.output + token * work.matrix.num_outputs + row, _mm512_mul_ps(values, row_scales));
        }
    }
}

template <typename Format>
REMUDA_AMX void multiply_all(const Work &work) {
    const int64_t num_units = work.matrix.num_inputs / kUnit;
    const int num_blocks = (work.num_tokens + kTokenBlock - 1) / kTokenBlock;
    alignas(64) uint8_t piece[kPieceUnits * kUnitBytes];
    Sums sums[kMostTokens / kTokenBlock];
    Format rows[kRows];
    FullTiles tiles;
    for (int64_t row = 0; row < work.matrix.num_outputs; row += kRows) {
        std::memset(sums, 0, num_blocks * sizeof(Sums));
        for (int r = 0; r < kRows; r++) rows[r] = Format(work.matrix, row + r);
        if (num_blocks == 1) load_sums(sums[0]);  // and they stay in the tiles
        for (int64_t first = 0; first < num_units; first += kPieceUnits) {
            const int64_t last = std::min(first + kPieceUnits, num_units);
            decode_piece<Format>(work.matrix, rows, row, first, last, piece);
            for (int i = 0; i < num_blocks; i++) {
                if (num_blocks > 1) load_sums(sums[i]);
                multiply(work, piece, first, last, i * kTokenBlock);
                if (num_blocks > 1) save_sums(sums[i]);
            }
        }
        if (num_blocks == 1) save_sums(sums[0]);
        store(work, row, sums);
    }
}

// Rows from `first` to [num_rows, num_inputs].
template <typename Format>
REMUDA_AMX void decode_rows(const Encoded &matrix, int64_t first, int64_t num_rows, uint8_t *output) {
    const int64_t num_units = matrix.num_inputs / kUnit;
    for (int64_t r = 0; r < num_rows; r++) {
        uint8_t *to = output + r * num_units * kTileBytes;
        decode_row<Format>(Format(matrix, first + r), matrix.group_units, 0, 0, num_units, to, kTileBytes);
    }
}

struct Operations {
    void (*multiply)(const Work &);
    void (*decode)(const Encoded &, int64_t, int64_t, uint8_t *);
};

template <typename Format>
constexpr Operations kOf{multiply_all<Format>, decode_rows<Format>};

// By number of the format, as in engine/kernels/encoded_linear.py.
constexpr Operations kFormats[] = {kOf<Float8>, kOf<ScaledFloat8>, kOf<Int8>, kOf<Int4>, kOf<Nf4>,
                                   kOf<Q4_0>,   kOf<Q8_0>,         kOf<Q4K>,  kOf<Q5K>,  kOf<Q6K>};

}  // namespace

extern "C" {

// output [num_tokens, num_outputs] = tokens [num_tokens, num_inputs] × matrixᵀ, both bfloat16 and contiguous. Both sizes
// of the matrix are multiples of 32; `scratch` holds num_tokens, rounded up to 16, × num_inputs values.
void remuda_linear_encoded(const Encoded *matrix, const uint16_t *tokens, uint16_t *output, uint8_t *scratch,
                           int64_t num_tokens) {
    const Packed packed{scratch, matrix->num_inputs * 2};
    pack_bf16(tokens, static_cast<int>(num_tokens), matrix->num_inputs, packed);
    kFormats[matrix->format].multiply(Work{*matrix, packed, output, static_cast<int>(num_tokens)});
}

// Rows `first` to `first` + num_rows, without output_scales, to bfloat16 [num_rows, num_inputs].
void remuda_decode_rows(const Encoded *matrix, int64_t first, int64_t num_rows, uint8_t *output) {
    kFormats[matrix->format].decode(*matrix, first, num_rows, output);
}
}

#endif
