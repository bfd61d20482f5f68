// The products of a few rows of bfloat16 with a panel of bfloat16 weights, pair by pair: vdpbf16ps.
//
// It multiplies pairs of bfloat16 exactly and adds both products to a float, which is flushed to 0 where it would be
// subnormal. A group of K is a broadcast a row and two such instructions a row.
#pragma once

namespace distilbert_fast {
namespace {

inline Vec add_pairs(Vec sum, Vec a, Vec b) {
  const auto pairs = [](Vec x) { return reinterpret_cast<__m512bh>(x.v); };
  return {_mm512_dpbf16_ps(sum.v, pairs(a), pairs(b))};
}

// The sums of R rows and a panel while K runs.
template <int R>
struct PairSums {
  Vec low[R], high[R];

  PairSums() {
    for (int r = 0; r < R; ++r) low[r] = high[r] = broadcast(0);
  }
  // A block of K: 64 bytes of each row.
  void add(const uint8_t* a, int64_t a_stride, const uint8_t* block) {
#pragma GCC unroll 4
    for (int g = 0; g < 16; ++g) {
      Vec w0 = load(reinterpret_cast<const float*>(block + g * 64));
      Vec w1 = load(reinterpret_cast<const float*>(block + g * 64 + kHalfBytes));
      hold(w0);
      hold(w1);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        Vec pair = broadcast(reinterpret_cast<const float*>(a + r * a_stride)[g]);
        hold(pair);
        low[r] = add_pairs(low[r], pair, w0);
        high[r] = add_pairs(high[r], pair, w1);
      }
    }
  }
  void write(float* out, int64_t stride) const {
    for (int r = 0; r < R; ++r) {
      store(out + r * stride, low[r]);
      store(out + r * stride + Vec::lanes, high[r]);
    }
  }
};

struct PairTile {
  using Sum = float;
  using Weights = TileWeights;
  static constexpr bool quantized = false;
  static constexpr int rows = 12, columns = 32;
  static constexpr int64_t depth = kAnyDepth;

  template <int R>
  static void run(const uint8_t* a, int64_t a_stride, const TileWeights& weights, const BlockRange* ranges,
                  int64_t range_count, bool, Prefetch prefetch, float* out) {
    PairSums<R> sums;
    for (int64_t i = 0; i < range_count; ++i) {
      const uint8_t* x = a + ranges[i].begin * 64;
      const uint8_t* w = weights.b + ranges[i].begin * kBlockBytes;
      for (int64_t k = ranges[i].begin; k < ranges[i].end; ++k, x += 64, w += kBlockBytes) {
        prefetch.some();
        sums.add(x, a_stride, w);
      }
    }
    sums.write(out, columns);
  }
};

// For attention_pairs.h.
struct PairProduct {
  static void begin() {}
  static void end() {}

  template <int R>
  static void tile(const uint8_t* a, int64_t a_stride, const uint8_t* panel, int64_t blocks, float* out,
                   int64_t out_stride) {
    PairSums<R> sums;
    for (int64_t k = 0; k < blocks; ++k) sums.add(a + k * 64, a_stride, panel + k * kBlockBytes);
    sums.write(out, out_stride);
  }
  template <int R>
  static void of_rows(int64_t rows, const uint8_t* a, int64_t a_stride, const uint8_t* panel, int64_t blocks,
                      float* out, int64_t out_stride) {
    if constexpr (R > 1) {
      if (rows < R) return of_rows<R - 1>(rows, a, a_stride, panel, blocks, out, out_stride);
    }
    tile<R>(a, a_stride, panel, blocks, out, out_stride);
  }
  static void multiply(const uint8_t* a, int64_t a_stride, int64_t rows, const uint8_t* panel, int64_t blocks,
                       float* out, int64_t out_stride) {
    const int64_t tiles = (rows + PairTile::rows - 1) / PairTile::rows;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
      of_rows<PairTile::rows>(end - begin, a + begin * a_stride, a_stride, panel, blocks, out + begin * out_stride,
                              out_stride);
    }
  }
};

}  // namespace
}  // namespace distilbert_fast
