// The products of a few rows of codes with half a panel of int8 weights, by vpmaddwd.
//
// vpmaddubsw would saturate: codes and weights are widened to int16, whose pairwise products and sums are exact. A
// register of sums holds four columns, two partial sums of each, which are added at the end.
#pragma once

namespace distilbert_fast {
namespace {

struct Int8Tile {
  using Sum = int32_t;
  static constexpr bool quantized = true;
  static constexpr int rows = 2, columns = 16;
  static constexpr int64_t depth = kAnyDepth;
  static constexpr int64_t a_block_bytes = 128;  // int16

  static void widen_row(const uint8_t* codes, int64_t blocks, uint8_t* out) {
    for (int64_t i = 0; i < blocks * 4; ++i) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i, _mm256_cvtepi8_epi16(x));
    }
  }

  template <int R>
  static void run(const uint8_t* a, int64_t a_stride, const uint8_t* b, const int32_t*, const BlockRange* ranges,
                  int64_t range_count, bool, Prefetch prefetch, int32_t* out) {
    __m256i sum[R][4];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm256_setzero_si256();
    }
    for (int64_t i = 0; i < range_count; ++i) {
      const uint8_t* x = a + ranges[i].begin * a_block_bytes;
      const uint8_t* w = b + ranges[i].begin * kBlockBytes;
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k, x += a_block_bytes, w += kBlockBytes) {
        prefetch.some();
#pragma GCC unroll 2
        for (int g = 0; g < 16; ++g) {
          __m256i codes[R];
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) {
            int64_t group;
            __builtin_memcpy(&group, x + r * a_stride + g * 8, 8);
            codes[r] = _mm256_set1_epi64x(group);
          }
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const __m256i weights =
                _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + g * 64) + v));
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
              sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(codes[r], weights));
            }
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 4; v += 2) {  // [a0 a0' a1 a1' | a2 …], [b0 …] -> [a0 a1 b0 b1 | a2 a3 b2 b3] -> in order
        const __m256i pairs = _mm256_hadd_epi32(sum[r][v], sum[r][v + 1]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * columns + v * 4),
                           _mm256_permute4x64_epi64(pairs, 0xd8));
      }
    }
  }
};

// Rows are widened a few at a time, once for all panels.
void gemm_widened(const Gemm& call, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                  uint8_t* scratch) {
  const int64_t stride = call.weights.blocks * Int8Tile::a_block_bytes;
  for (int64_t begin = row_begin; begin < row_end; begin += kWidenedRows) {
    const int64_t end = begin + kWidenedRows < row_end ? begin + kWidenedRows : row_end;
    for (int64_t r = begin; r < end; ++r) {
      Int8Tile::widen_row(call.a + r * call.a_stride, call.weights.blocks, scratch + (r - begin) * stride);
    }
    multiply_rows<Int8Tile>(call, scratch, stride, begin, end, panel_begin, panel_end);
  }
}

}  // namespace
}  // namespace distilbert_fast
