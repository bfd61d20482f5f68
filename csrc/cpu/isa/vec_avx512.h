// Vec: 16 floats in a zmm register.
#pragma once

// GCC 12 warns of the undefined operands inside its own intrinsics.
#ifndef __clang__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#ifndef __clang__
#pragma GCC diagnostic pop
#endif

#include "cpu/isa/kernels.h"

namespace distilbert_fast {
namespace {

struct Vec {
  static constexpr int64_t lanes = 16;
  __m512 v;
};

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // ab + c
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c − ab
inline Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

inline Vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }

// Round half to even; a NaN stays one.
inline __m256i narrow(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load_first(const float* p, int64_t n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)};
}
inline Vec load_first(const bfloat16* p, int64_t n, float fill) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), widen(_mm256_maskz_loadu_epi16(first(n), p)).v)};
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(bfloat16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void store_first(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline void store_first(bfloat16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }

// Around the caches; p is aligned to a whole vector.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
inline void stream(bfloat16* p, Vec x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void finish_streams() { _mm_sfence(); }

inline Vec round_to_int(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// x · 2^n for whole n; 0 for n < −125. A NaN stays one.
inline Vec times_power_of_two(Vec x, Vec n) {
  const __mmask16 kept = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(kept, x.v, n.v)};
}

inline Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec magnitude(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec from_int32(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
inline Vec from_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

// In a register from here on: not to be loaded again by each instruction that reads it.
inline void hold(Vec& x) { __asm__("" : "+v"(x.v)); }

// Of pairs of bfloat16, the elements at even and at odd places.
inline Vec even_of_pairs(const void* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Vec odd_of_pairs(const void* p) {
  return {
      _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

// The larger of a, itself a magnitude, and |b| by the order of their bits: finite < ∞ < NaN.
inline Vec larger_magnitude(Vec a, Vec b) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a.v), magnitude))};
}
inline float largest_magnitude(Vec a) {
  const __m128i bits = _mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(_mm512_castps_si512(a.v))));
  return _mm_cvtss_f32(_mm_castsi128_ps(bits));
}

// x clamped to ±127 and rounded half to even, in two's complement XOR flip; NaN gives 0.
inline __m128i codes(Vec x, uint8_t flip) {
  const __m512 low = _mm512_max_ps(_mm512_set1_ps(-127), x.v);  // a NaN, on the right, stays one
  const __m512i whole = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_set1_ps(127), low));
  return _mm_xor_si128(_mm512_cvtepi32_epi8(whole), _mm_set1_epi8(static_cast<char>(flip)));  // NaN is 0x80000000
}
inline void store_codes(uint8_t* p, Vec x, uint8_t flip) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes(x, flip));
}
inline void store_codes_first(uint8_t* p, Vec x, uint8_t flip, int64_t n) {
  _mm_mask_storeu_epi8(p, first(n), codes(x, flip));
}
// Of four vectors whose values round to ±127 at most.
inline void store_small_codes(uint8_t* p, Vec a, Vec b, Vec c, Vec d, uint8_t flip) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd));
  _mm512_storeu_si512(p, _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(flip))));
}

// 16 rows of 16 become 16 columns: pairs, then fours within 128 bits, then the blocks of 128 bits themselves.
inline void transpose(Vec (&x)[16]) {
  __m512 two[16], four[16];
  for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    two[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; ++i) {
    const __m512d a = _mm512_castps_pd(two[i / 4 * 4 + i % 4 / 2]),
                  b = _mm512_castps_pd(two[i / 4 * 4 + i % 4 / 2 + 2]);
    four[i] = _mm512_castpd_ps(i % 2 == 0 ? _mm512_unpacklo_pd(a, b) : _mm512_unpackhi_pd(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(four[i], four[4 + i], 0x44),
                 b = _mm512_shuffle_f32x4(four[i], four[4 + i], 0xee);
    const __m512 c = _mm512_shuffle_f32x4(four[8 + i], four[12 + i], 0x44);
    const __m512 d = _mm512_shuffle_f32x4(four[8 + i], four[12 + i], 0xee);
    x[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    x[4 + i].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[8 + i].v = _mm512_shuffle_f32x4(b, d, 0x88);
    x[12 + i].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// The tables [8, 16] of a panel of codebook16.
struct CodeTables {
  __m512i low, high;  // for the lower and for the upper halves of bytes

  explicit CodeTables(const uint8_t* tables) : low(_mm512_loadu_si512(tables)), high(_mm512_loadu_si512(tables + 64)) {}

  // A group of 64 bytes of codes becomes one of each half of the panel.
  inline __attribute__((always_inline)) void look_up(const uint8_t* group, __m512i& w0, __m512i& w1) const {
    const __m512i codes = _mm512_loadu_si512(group), four_bits = _mm512_set1_epi8(15);
    w0 = _mm512_shuffle_epi8(low, _mm512_and_si512(codes, four_bits));
    w1 = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16(codes, 4), four_bits));
  }
  // A block.
  void expand(const uint8_t* codes, uint8_t* out) const {
    for (int64_t g = 0; g < kHalfBytes; g += 64) {
      __m512i w0, w1;
      look_up(codes + g, w0, w1);
      _mm512_store_si512(out + g, w0);
      _mm512_store_si512(out + kHalfBytes + g, w1);
    }
  }
};

}  // namespace
}  // namespace distilbert_fast
