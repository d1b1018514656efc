// Intel's tile unit (AMX): whether it may be used, its configuration, and what the kernels around it share.
// Only where REMUDA_TILES is defined.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#define REMUDA_TILES

#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REMUDA_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")))

namespace remuda {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row of a tile

// GCC's tile intrinsics do not say what memory they read: what was written before must be in memory by then.
inline void finish_writes() { __asm__ volatile("" ::: "memory"); }

// Asks for a cache line, so that it comes while something else is computed. Not _mm_prefetch: GCC takes a function that
// does nothing else for one without effects, and leaves it out.
inline void fetch(const void *line) { __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char *>(line))); }

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// All eight tiles in full width, for the life of this object; the first `num_short` have fewer rows than 16, and are the
// faster for it. Others (oneDNN) rely on the configuration that they left.
class FullTiles {
  public:
    REMUDA_AMX explicit FullTiles(int num_short = 0, int short_rows = kTileRows) {
        TileConfig ours;
        for (int i = 0; i < 8; i++) {
            ours.row_bytes[i] = kTileBytes;
            ours.rows[i] = i < num_short ? short_rows : kTileRows;
        }
        finish_writes();
        _tile_storeconfig(&former_);
        finish_writes();
        _tile_loadconfig(&ours);
    }
    REMUDA_AMX ~FullTiles() {
        finish_writes();
        if (former_.palette == 0) {
            _tile_release();
        } else {
            _tile_loadconfig(&former_);
        }
    }
    FullTiles(const FullTiles &) = delete;
    FullTiles &operator=(const FullTiles &) = delete;

  private:
    TileConfig former_;
};

// Asks the kernel once; it then allows the process's threads to use the tiles' registers.
inline bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    static const bool allowed = [] {
        unsigned a, b, c, d;
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        bool has_amx = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
        __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
        bool has_bf16 = a >> 5 & 1;
        return has_amx && has_bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return allowed;
}

// exp(x) for x ≤ 88, to about 1e-7; NaN of NaN (the minimum and maximum are then their second operand).
REMUDA_AMX inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0F), _mm512_min_ps(_mm512_set1_ps(88.0F), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504F)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375F), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4F), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4F);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3F));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3F));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2F));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1F));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1F));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0F));
    return _mm512_scalef_ps(p, n);
}

}  // namespace remuda

#endif
