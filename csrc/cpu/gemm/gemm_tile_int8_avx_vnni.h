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

// A group of weights of 16 columns: where they lie,
struct StoredWeights {
  static constexpr int rows = 6;
  static constexpr int64_t block = kBlockBytes;
  explicit StoredWeights(const TileWeights&) {}
  void read(const uint8_t* group, __m256i& low, __m256i& high) const {
    low = load_bytes(group);
    high = load_bytes(group + 32);
  }
};

// or looked up. There are not enough registers for more rows.
struct CodedWeights {
  static constexpr int rows = 4;
  static constexpr int64_t block = kBlockBytes / 2;
  explicit CodedWeights(const TileWeights& weights)
      : tables{load_bytes(weights.tables), load_bytes(weights.tables + 32)}, shift(_mm_cvtsi32_si128(weights.shift)) {}
  void read(const uint8_t* group, __m256i& low, __m256i& high) const {
    const __m256i four_bits = _mm256_set1_epi8(15);
    low = _mm256_and_si256(_mm256_srl_epi16(load_bytes(group), shift), four_bits);
    high = _mm256_and_si256(_mm256_srl_epi16(load_bytes(group + 32), shift), four_bits);
    low = _mm256_shuffle_epi8(tables[0], low);
    high = _mm256_shuffle_epi8(tables[1], high);
  }
  const __m256i tables[2];
  const __m128i shift;
};

template <class Reader>
struct VnniTile {
  using Sum = int32_t;
  using Vector = __m256i;
  using Weights = TileWeights;
  static constexpr bool quantized = true;
  static constexpr int rows = Reader::rows, columns = 16;
  static constexpr int64_t few_rows = rows;
  static constexpr int64_t depth = kAnyDepth;
  static constexpr int64_t a_block_bytes = 64;

  // −128 · Σ_k w: of all blocks, where their sums are known, or of some.
  static void start(const TileWeights& weights, const Reader& reader, const BlockRange* ranges, int64_t range_count,
                    __m256i& low, __m256i& high) {
    low = high = _mm256_setzero_si256();
    if (weights.column_sums != nullptr) {
      low = load_bytes(weights.column_sums);
      high = load_bytes(weights.column_sums + 8);
    } else {
      const auto add = [](__m256i& sum, __m256i w) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), w);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_set1_epi16(1), pairs));
      };
      for (int64_t i = 0; i < range_count; ++i) {
        for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k) {
          for (int g = 0; g < 16; ++g) {
            __m256i w0, w1;
            reader.read(weights.b + k * Reader::block + g * 64, w0, w1);
            add(low, w0);
            add(high, w1);
          }
        }
      }
    }
    low = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(low, 7));
    high = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(high, 7));
  }

  // Not inlined: with several heights in one function gcc spills.
  template <int R>
  static __attribute__((noinline)) void run(const uint8_t* a, int64_t a_stride, const TileWeights& weights,
                                            const BlockRange* ranges, int64_t range_count, bool, Prefetch prefetch,
                                            int32_t* out) {
    const Reader reader(weights);
    Int8Sums<R, VnniTile> sums;
    __m256i low, high;
    start(weights, reader, ranges, range_count, low, high);
    sums.start(low, high);
    for (int64_t i = 0; i < range_count; ++i) {
      const uint8_t* x = a + ranges[i].begin * a_block_bytes;
      const uint8_t* w = weights.b + ranges[i].begin * Reader::block;
      // Three rows by one pointer and what an address can say.
      const uint8_t* rows[2] = {x, x + 3 * a_stride};
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k, w += Reader::block - kHalfBytes) {
        prefetch.some();
        for (int quarter = 0; quarter < 4; ++quarter, w += 256) {
#pragma GCC unroll 4
          for (int g = 0; g < 4; ++g) {
            __m256i w0, w1;
            reader.read(w + g * 64, w0, w1);
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

using Int8Tile = VnniTile<StoredWeights>;
using CodeTile = VnniTile<CodedWeights>;

}  // namespace
}  // namespace distilbert_fast
