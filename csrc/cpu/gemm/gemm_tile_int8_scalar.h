// The products of a row of codes with half a panel of int8 weights, one by one.
#pragma once

namespace distilbert_fast {
namespace {

struct Int8Tile {
  using Sum = int32_t;
  using Weights = TileWeights;
  static constexpr bool quantized = true;
  static constexpr int rows = 1, columns = 16;
  static constexpr int64_t depth = kAnyDepth;
  static constexpr int64_t a_block_bytes = 64;

  template <int R>
  static void run(const uint8_t* a, int64_t, const TileWeights& weights, const BlockRange* ranges, int64_t range_count,
                  bool, Prefetch, int32_t* out) {
    static_assert(R == 1, "one row at a time");
    uint32_t sum[16] = {};  // wraps around as every tier's sums do
    for (int64_t i = 0; i < range_count; ++i) {
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k) {
        const int8_t* x = reinterpret_cast<const int8_t*>(a + k * a_block_bytes);
        const int8_t* w = reinterpret_cast<const int8_t*>(weights.b + k * kBlockBytes);
        for (int g = 0; g < 16; ++g, x += 4, w += 64) {
          for (int c = 0; c < 16; ++c) {
            const int8_t* p = w + c * 4;
            sum[c] += static_cast<uint32_t>(x[0] * p[0] + x[1] * p[1] + x[2] * p[2] + x[3] * p[3]);
          }
        }
      }
    }
    for (int c = 0; c < 16; ++c) out[c] = static_cast<int32_t>(sum[c]);
  }
};

}  // namespace
}  // namespace distilbert_fast
