// The products of a few rows of codes with a panel of int8 weights, by VNNI.
//
// VNNI multiplies unsigned by signed bytes: the codes come as code + 128 = code XOR 128, and the sums start from −128 ·
// Σ_k w.
#pragma once

#include "cpu/gemm/int8_sums.h"

namespace distilbert_fast {
namespace {

// In assembly, and in this order: left to itself gcc 12 loads w0 and w1 again for each row, or spills sums.
inline __attribute__((always_inline)) void add_byte_products(__m512i& low, __m512i& high, const uint32_t& group,
                                                             __m512i w0, __m512i w1) {
  __m512i codes;
  __asm__ volatile(
      "vpbroadcastd %[group], %[codes]\n\t"
      "vpdpbusd %[w0], %[codes], %[low]\n\t"
      "vpdpbusd %[w1], %[codes], %[high]"
      : [codes] "=&v"(codes), [low] "+v"(low), [high] "+v"(high)
      : [group] "m"(group), [w0] "v"(w0), [w1] "v"(w1));
}

// Both halves of a group of weights: where they lie,
struct StoredWeights {
  static constexpr int64_t block = kBlockBytes;
  explicit StoredWeights(const TileWeights&) {}
  void read(const uint8_t* group, __m512i& low, __m512i& high) const {
    low = _mm512_loadu_si512(group);
    high = _mm512_loadu_si512(group + kHalfBytes);
  }
};

// or looked up.
struct CodedWeights {
  static constexpr int64_t block = kBlockBytes / 2;
  explicit CodedWeights(const TileWeights& weights) : tables(weights.tables) {}
  void read(const uint8_t* group, __m512i& low, __m512i& high) const { tables.look_up(group, low, high); }
  const CodeTables tables;
};

template <class Reader>
struct VnniTile {
  using Sum = int32_t;
  using Vector = __m512i;
  using Weights = TileWeights;
  static constexpr bool quantized = true;
  static constexpr int rows = 12, columns = 32;
  static constexpr int64_t few_rows = rows;
  static constexpr int64_t depth = kAnyDepth;
  static constexpr int64_t a_block_bytes = 64;

  // −128 · Σ_k w: of all blocks, where their sums are known, or of some.
  static void start(const TileWeights& weights, const Reader& reader, const BlockRange* ranges, int64_t range_count,
                    __m512i& low, __m512i& high) {
    low = high = _mm512_setzero_si512();
    if (weights.column_sums != nullptr) {
      low = _mm512_slli_epi32(_mm512_loadu_si512(weights.column_sums), 7);
      high = _mm512_slli_epi32(_mm512_loadu_si512(weights.column_sums + 16), 7);
    } else {
      const __m512i factor = _mm512_set1_epi8(-128);  // unsigned: 128
      for (int64_t i = 0; i < range_count; ++i) {
        for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k) {
          for (int g = 0; g < 16; ++g) {
            __m512i w0, w1;
            reader.read(weights.b + k * Reader::block + g * 64, w0, w1);
            low = _mm512_dpbusd_epi32(low, factor, w0);
            high = _mm512_dpbusd_epi32(high, factor, w1);
          }
        }
      }
    }
    low = _mm512_sub_epi32(_mm512_setzero_si512(), low);
    high = _mm512_sub_epi32(_mm512_setzero_si512(), high);
  }

  template <int R>
  static void run(const uint8_t* a, int64_t a_stride, const TileWeights& weights, const BlockRange* ranges,
                  int64_t range_count, bool, Prefetch prefetch, int32_t* out) {
    const Reader reader(weights);
    Int8Sums<R, VnniTile> sums;
    __m512i low, high;
    start(weights, reader, ranges, range_count, low, high);
    sums.start(low, high);
    for (int64_t i = 0; i < range_count; ++i) {
      const uint8_t* x = a + ranges[i].begin * a_block_bytes;
      const uint8_t* w = weights.b + ranges[i].begin * Reader::block;
      // Three rows by one pointer and what an address can say, for there are not enough registers for a pointer each.
      const uint8_t* rows[4] = {x, x + 3 * a_stride, x + 6 * a_stride, x + 9 * a_stride};
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k) {
        prefetch.some();
        for (int quarter = 0; quarter < 4; ++quarter, w += 256) {
          // Not to be known for what it was, lest the compiler makes a pointer for each row of it after all.
          __asm__("" : "+r"(a_stride));
#pragma GCC unroll 4
          for (int g = 0; g < 4; ++g) {
            __m512i w0, w1;
            reader.read(w + g * 64, w0, w1);
            sums.each_row([&](int r, __m512i& low, __m512i& high) __attribute__((always_inline)) {
              const uint8_t* group = rows[r / 3] + r % 3 * a_stride + g * 4;
              add_byte_products(low, high, *reinterpret_cast<const uint32_t*>(group), w0, w1);
            });
          }
          for (const uint8_t*& row : rows) row += 16;
        }
        w += Reader::block - kHalfBytes;
      }
    }
    sums.write(out);
  }
};

using Int8Tile = VnniTile<StoredWeights>;
using CodeTile = VnniTile<CodedWeights>;

}  // namespace
}  // namespace distilbert_fast
