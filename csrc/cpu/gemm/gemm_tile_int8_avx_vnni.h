// The products of a few rows of codes with half a panel of int8 weights, by AVX-VNNI.
//
// VNNI multiplies unsigned by signed bytes: the codes come as code + 128 = code XOR 128, and the sums start from −128 ·
// Σ_k w.
#pragma once

#include "cpu/gemm/int8_sums.h"
#include "cpu/gemm/vpdpbusd.h"

namespace distilbert_fast {
namespace {

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

struct Int8Tile {
  using Sum = int32_t;
  using Vector = __m256i;
  using Weights = TileWeights;
  static constexpr bool quantized = true;
  static constexpr int rows = 6, columns = 16;
  static constexpr int64_t depth = kAnyDepth;
  static constexpr int64_t a_block_bytes = 64;

  // −128 · Σ_k w of eight columns: of all blocks, where their sums are known, or of some.
  static __m256i start(const uint8_t* b, const int32_t* column_sums, const BlockRange* ranges, int64_t range_count) {
    __m256i sum = _mm256_setzero_si256();
    if (column_sums != nullptr) {
      sum = load_bytes(column_sums);
    } else {
      for (int64_t i = 0; i < range_count; ++i) {
        for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k) {
          for (int g = 0; g < 16; ++g) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_bytes(b + k * kBlockBytes + g * 64));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_set1_epi16(1), pairs));
          }
        }
      }
    }
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sum, 7));
  }

  // Not inlined: with several heights in one function gcc spills.
  template <int R>
  static __attribute__((noinline)) void run(const uint8_t* a, int64_t a_stride, const TileWeights& weights,
                                            const BlockRange* ranges, int64_t range_count, bool, Prefetch prefetch,
                                            int32_t* out) {
    Int8Sums<R, Int8Tile> sums;
    const int32_t* known = weights.column_sums;
    sums.start(start(weights.b, known, ranges, range_count),
               start(weights.b + 32, known == nullptr ? nullptr : known + 8, ranges, range_count));
    for (int64_t i = 0; i < range_count; ++i) {
      const uint8_t* x = a + ranges[i].begin * a_block_bytes;
      const uint8_t* w = weights.b + ranges[i].begin * kBlockBytes;
      // Three rows by one pointer and what an address can say.
      const uint8_t* rows[2] = {x, x + 3 * a_stride};
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k, w += kHalfBytes) {
        prefetch.some();
        for (int quarter = 0; quarter < 4; ++quarter, w += 256) {
#pragma GCC unroll 4
          for (int g = 0; g < 4; ++g) {
            __m256i w0 = load_bytes(w + g * 64), w1 = load_bytes(w + g * 64 + 32);
            __asm__("" : "+x"(w0), "+x"(w1));
            sums.each_row([&](int r, __m256i& low, __m256i& high) __attribute__((always_inline)) {
              const uint8_t* group = rows[r / 3] + r % 3 * a_stride + g * 4;
              add_byte_products(low, high, *reinterpret_cast<const uint32_t*>(group), w0, w1);
            });
          }
          for (const uint8_t*& row : rows) row += 16;
        }
      }
    }
    sums.write(out);
  }
};

}  // namespace
}  // namespace distilbert_fast
