// The products of a few rows with half a panel or a whole one, in float32: weights float or bfloat16.
//
// Each group of K is a broadcast a row and a fused multiply-add a row and vector. The sum of an element runs over K in
// order, whatever the shape of the tile.
#pragma once

namespace distilbert_fast {
namespace {

constexpr int kTileColumns = Vec::lanes == 16 ? 32 : 16;
constexpr int kTileVecs = kTileColumns / static_cast<int>(Vec::lanes);
constexpr int kTileRows = Vec::lanes == 16 ? 12 : Vec::lanes == 8 ? 6 : 2;
// Of AVX2 processors many have a first cache of 32 KB: 12 KB of half a panel stay there beside a tile's rows.
constexpr int64_t kTileDepth = Vec::lanes == 8 ? 12 : kAnyDepth;

// Vector v of a group: those of the panel's second half lie behind its first half.
inline const uint8_t* group_vec(const uint8_t* group, int v) {
  const int bytes = v * static_cast<int>(Vec::lanes) * 4;
  return group + (bytes / 64) * kHalfBytes + bytes % 64;
}

struct FloatWeights {
  static constexpr int parts = 1;  // of K in a group
  static Vec part(const uint8_t* group, int) { return load(reinterpret_cast<const float*>(group)); }
};

// The activations stay float: as bfloat16 they would be widened again for each product.
struct BFloat16Weights {
  static constexpr int parts = 2;
  static Vec part(const uint8_t* group, int i) { return i == 0 ? even_of_pairs(group) : odd_of_pairs(group); }
};

template <class Format>
struct FloatTile {
  using Sum = float;
  using Weights = TileWeights;
  static constexpr bool quantized = false;
  static constexpr int rows = kTileRows, columns = kTileColumns;
  static constexpr int64_t depth = kTileDepth;
  static constexpr int64_t a_block_bytes = 64 * Format::parts;

  template <int R>
  static void run(const uint8_t* a, int64_t a_stride, const TileWeights& weights, const BlockRange* ranges,
                  int64_t range_count, bool go_on, Prefetch prefetch, float* out) {
    Vec sum[R][kTileVecs];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kTileVecs; ++v) sum[r][v] = go_on ? load(out + r * columns + v * Vec::lanes) : broadcast(0);
    }
    for (int64_t i = 0; i < range_count; ++i) {
      const uint8_t* x = a + ranges[i].begin * a_block_bytes;
      const uint8_t* w = weights.b + ranges[i].begin * kBlockBytes;
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k, x += a_block_bytes, w += kBlockBytes) {
        prefetch.some();
#pragma GCC unroll 4
        for (int g = 0; g < 16; ++g) {
#pragma GCC unroll 2
          for (int i = 0; i < Format::parts; ++i) {
            Vec columns_of_k[kTileVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kTileVecs; ++v) {
              columns_of_k[v] = Format::part(group_vec(w + g * 64, v), i);
              hold(columns_of_k[v]);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
              const Vec activation = broadcast(reinterpret_cast<const float*>(x + r * a_stride)[g * Format::parts + i]);
#pragma GCC unroll 4
              for (int v = 0; v < kTileVecs; ++v) sum[r][v] = fma(activation, columns_of_k[v], sum[r][v]);
            }
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kTileVecs; ++v) store(out + r * columns + v * Vec::lanes, sum[r][v]);
    }
  }
};

}  // namespace
}  // namespace distilbert_fast
