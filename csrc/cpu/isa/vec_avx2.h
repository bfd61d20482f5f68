// Vec: 8 floats in a ymm register.
#pragma once

#include <immintrin.h>

#include "cpu/isa/kernels.h"

namespace distilbert_fast {
namespace {

struct Vec {
  static constexpr int64_t lanes = 8;
  __m256 v;
};

inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // ab + c
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c − ab
inline Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

inline Vec widen(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }

// Round half to even; a NaN stays one.
inline __m128i narrow(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm256_castsi256_si128(packed);
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bfloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load_first(const float* p, int64_t n, float fill) {
  const __m256i mask = first(n);
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
}
inline Vec load_first(const bfloat16* p, int64_t n, float fill) {
  alignas(16) uint16_t bits[Vec::lanes] = {};
  for (int64_t i = 0; i < n; ++i) bits[i] = p[i].bits;
  const Vec x = widen(_mm_load_si128(reinterpret_cast<const __m128i*>(bits)));
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), x.v, _mm256_castsi256_ps(first(n)))};
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(bfloat16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
inline void store_first(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, first(n), x.v); }
inline void store_first(bfloat16* p, Vec x, int64_t n) {
  alignas(16) uint16_t bits[Vec::lanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(bits), narrow(x));
  for (int64_t i = 0; i < n; ++i) p[i].bits = bits[i];
}

// Around the caches; p is aligned to a whole vector.
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x.v); }
inline void stream(bfloat16* p, Vec x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
inline void finish_streams() { _mm_sfence(); }

inline Vec round_to_int(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// x · 2^n for whole n ≤ 127; 0 for n < −125. A NaN stays one.
inline Vec times_power_of_two(Vec x, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  const __m256 tiny = _mm256_cmp_ps(n.v, _mm256_set1_ps(-125.0f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(tiny, _mm256_mul_ps(x.v, _mm256_castsi256_ps(exponent)))};
}

inline Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec from_int32(const int32_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec from_int8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}

// In a register from here on: not to be loaded again by each instruction that reads it.
inline void hold(Vec& x) { __asm__("" : "+x"(x.v)); }

// Of pairs of bfloat16, the elements at even and at odd places.
inline Vec even_of_pairs(const void* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)), 16))};
}
inline Vec odd_of_pairs(const void* p) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), mask))};
}

// The larger of a, itself a magnitude, and |b| by the order of their bits: finite < ∞ < NaN.
inline Vec larger_magnitude(Vec a, Vec b) {
  const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(b.v), _mm256_set1_epi32(0x7fffffff));
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), magnitude))};
}
inline float largest_magnitude(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1))));
}

// x clamped to ±127 and rounded half to even, in two's complement XOR flip, in the low 8 bytes; NaN gives 0.
inline __m128i codes(Vec x, uint8_t flip) {
  const __m256 low = _mm256_max_ps(_mm256_set1_ps(-127), x.v);  // a NaN, on the right, stays one
  const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(127), low));
  const __m256i lowest_bytes = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(whole, lowest_bytes);  // NaN is 0x80000000
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  return _mm_xor_si128(both, _mm_set1_epi8(static_cast<char>(flip)));
}
inline void store_codes(uint8_t* p, Vec x, uint8_t flip) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), codes(x, flip));
}
inline void store_codes_first(uint8_t* p, Vec x, uint8_t flip, int64_t n) {
  alignas(16) uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), codes(x, flip));
  for (int64_t i = 0; i < n; ++i) p[i] = bytes[i];
}
// Of four vectors whose values round to ±127 at most.
inline void store_small_codes(uint8_t* p, Vec a, Vec b, Vec c, Vec d, uint8_t flip) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c.v), _mm256_cvtps_epi32(d.v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(flip))));
}

// 8 rows of 8 become 8 columns: pairs, then fours within 128 bits, then the halves.
inline void transpose(Vec (&x)[8]) {
  __m256 two[8], four[8];
  for (int i = 0; i < 8; i += 2) {
    two[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    two[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; ++i) {
    const __m256d a = _mm256_castps_pd(two[i / 4 * 4 + i % 4 / 2]),
                  b = _mm256_castps_pd(two[i / 4 * 4 + i % 4 / 2 + 2]);
    four[i] = _mm256_castpd_ps(i % 2 == 0 ? _mm256_unpacklo_pd(a, b) : _mm256_unpackhi_pd(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(four[i], four[4 + i], 0x20);
    x[4 + i].v = _mm256_permute2f128_ps(four[i], four[4 + i], 0x31);
  }
}

// The tables [8, 16] of a panel of codebook16.
struct CodeTables {
  __m256i low[2], high[2];  // for the lower and for the upper halves of bytes

  explicit CodeTables(const uint8_t* tables) {
    const __m256i* const p = reinterpret_cast<const __m256i*>(tables);
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm256_loadu_si256(p + i);
      high[i] = _mm256_loadu_si256(p + 2 + i);
    }
  }
  // A block.
  void expand(const uint8_t* codes, uint8_t* out) const {
    const __m256i four_bits = _mm256_set1_epi8(15);
    for (int64_t g = 0; g < kHalfBytes; g += 64) {
      for (int i = 0; i < 2; ++i) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g) + i);
        const __m256i w0 = _mm256_shuffle_epi8(low[i], _mm256_and_si256(both, four_bits));
        const __m256i w1 = _mm256_shuffle_epi8(high[i], _mm256_and_si256(_mm256_srli_epi16(both, 4), four_bits));
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + g) + i, w0);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + kHalfBytes + g) + i, w1);
      }
    }
  }
};

}  // namespace
}  // namespace distilbert_fast
