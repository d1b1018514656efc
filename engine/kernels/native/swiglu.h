// SwiGLU (arXiv 2002.05202) of 16 numbers. Only where REMUDA_TILES is defined.
#pragma once

#include <cmath>
#include <cstdint>

#include "tiles.h"

#ifdef REMUDA_TILES

namespace remuda {

REMUDA_AMX inline __m512 widened(__m256i narrow) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

REMUDA_AMX inline __m256i narrowed(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }

// To what bfloat16 can hold.
REMUDA_AMX inline __m512 rounded(__m512 values) { return widened(narrowed(values)); }

// silu(gate), rounded to bfloat16, × up.
REMUDA_AMX inline __m512 swiglu(__m512 gate, __m512 up) {
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    // The exponential stops at e⁸⁸; beyond it there is nothing left of a finite gate.
    const __mmask16 is_low = _mm512_cmp_ps_mask(gate, _mm512_set1_ps(-87.0F), _CMP_LT_OQ) &
                             _mm512_cmp_ps_mask(gate, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);
    const __m512 quotient = _mm512_div_ps(gate, _mm512_add_ps(e, _mm512_set1_ps(1.0F)));
    return _mm512_mul_ps(rounded(_mm512_mask_mov_ps(quotient, is_low, _mm512_setzero_ps())), up);
}

}  // namespace remuda

#endif
