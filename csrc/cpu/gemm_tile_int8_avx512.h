// The products of a few rows of codes with a panel of int8 weights, by VNNI.
//
// VNNI multiplies unsigned by signed bytes: the codes come as code + 128 = code XOR 128, and the sums start from −128 ·
// Σ_k w.
#pragma once

namespace distilbert_fast {
namespace {

struct Int8Tile {
  using Sum = int32_t;
  static constexpr bool quantized = true;
  static constexpr int rows = 12, columns = 32;
  static constexpr int64_t a_block_bytes = 64;

  // 128 · Σ_k w of some blocks.
  static __m512i added_by(const uint8_t* b, const BlockRange* ranges, int64_t range_count) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < range_count; ++i) {
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k) {
        const uint8_t* w = b + k * kBlockBytes;
        for (int g = 0; g < 16; ++g) {
          sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), _mm512_loadu_si512(w + g * 64));  // unsigned: 128
        }
      }
    }
    return sum;
  }

  template <int R>
  static void run(const uint8_t* a, int64_t a_stride, const uint8_t* b, const int32_t* column_sums,
                  const BlockRange* ranges, int64_t range_count, Prefetch prefetch, int32_t* out) {
    __m512i sum[R][2];
    for (int v = 0; v < 2; ++v) {
      const __m512i added = column_sums != nullptr ? _mm512_slli_epi32(_mm512_loadu_si512(column_sums + v * 16), 7)
                                                   : added_by(b + v * kHalfBytes, ranges, range_count);
      for (int r = 0; r < R; ++r) sum[r][v] = _mm512_sub_epi32(_mm512_setzero_si512(), added);
    }
    for (int64_t i = 0; i < range_count; ++i) {
      const uint8_t* x = a + ranges[i].begin * a_block_bytes;
      const uint8_t* w = b + ranges[i].begin * kBlockBytes;
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k, x += a_block_bytes, w += kBlockBytes) {
        prefetch.some();
#pragma GCC unroll 4
        for (int g = 0; g < 16; ++g) {
          const __m512i w0 = _mm512_loadu_si512(w + g * 64), w1 = _mm512_loadu_si512(w + g * 64 + kHalfBytes);
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) {
            int32_t group;
            __builtin_memcpy(&group, x + r * a_stride + g * 4, 4);
            const __m512i codes = _mm512_set1_epi32(group);
            sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], codes, w0);
            sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], codes, w1);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 2; ++v) _mm512_store_si512(out + r * columns + v * 16, sum[r][v]);
    }
  }
};

}  // namespace
}  // namespace distilbert_fast
