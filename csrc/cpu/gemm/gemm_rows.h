// Linear layers, panel by panel: tiles of sums from gemm_tile_*.h, each finished while it is in the first cache.
//
// Panels are the outer loop: a panel (24 KiB for K = 768 int8) stays in the first or second cache while the rows pass
// by, and the next one is fetched meanwhile. W is read once, A once a panel.
#pragma once

namespace distilbert_fast {
namespace {

// Weights of the next panel on their way into the second cache, a few lines with each block of this one.
struct Prefetch {
  const uint8_t* next;
  int lines;
  void some() {
    for (int i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

inline Vec sums_of(const float* p) { return load(p); }
inline Vec sums_of(const int32_t* p) { return from_int32(p); }

// y = activation(sum · a_scale · scale + bias) + residual for `rows` rows and `columns` columns, which is stored.
template <class Tile, Activation kActivation>
void finish_as(const Gemm& call, const typename Tile::Sum* sums, int64_t row, int64_t rows, int64_t column,
               int64_t columns) {
  for (int64_t r = row; r < row + rows; ++r, sums += Tile::columns) {
    Vec a_scale = broadcast(1.0f), codes_per_unit = broadcast(0.0f);
    if (Tile::quantized) a_scale = broadcast(call.a_scale[r * call.a_scale_stride]);
    if (call.output == Output::codes && call.out_factors == nullptr) {
      codes_per_unit = broadcast(inverse_of(call.out_scale[r * call.out_scale_stride]));
    }
    for (int64_t c = 0; c < columns; c += Vec::lanes) {
      const int64_t n = columns - c < Vec::lanes ? columns - c : Vec::lanes, f = column + c;
      Vec y = sums_of(sums + c);
      if (Tile::quantized) y = mul(mul(y, a_scale), load(call.weights.scale + f));
      y = add(y, load(call.weights.bias + f));
      if (kActivation == Activation::gelu) y = gelu(y);
      if (kActivation == Activation::gelu_fast) y = gelu_fast(y);
      if (call.residual != nullptr) {
        const int64_t at = r * call.residual_stride + f;
        y = add(y, call.residual_is_bfloat16 ? load_first(static_cast<const bfloat16*>(call.residual) + at, n, 0)
                                             : load_first(static_cast<const float*>(call.residual) + at, n, 0));
      }
      const int64_t at = r * call.out_stride + f;
      if (call.output == Output::float32) {
        float* out = static_cast<float*>(call.out) + at;
        n == Vec::lanes ? store(out, y) : store_first(out, y, n);
      } else if (call.output == Output::bfloat16) {
        bfloat16* out = static_cast<bfloat16*>(call.out) + at;
        n == Vec::lanes ? store(out, y) : store_first(out, y, n);
      } else {
        uint8_t* out = static_cast<uint8_t*>(call.out) + at;
        y = mul(y, call.out_factors == nullptr ? codes_per_unit : load(call.out_factors + f));
        n == Vec::lanes ? store_codes(out, y, call.out_flip) : store_codes_first(out, y, call.out_flip, n);
      }
    }
  }
}

template <class Tile>
void finish(const Gemm& call, const typename Tile::Sum* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t left = call.weights.columns - column;
  const int64_t columns = left < Tile::columns ? left : Tile::columns;
  switch (call.activation) {
    case Activation::none:
      return finish_as<Tile, Activation::none>(call, sums, row, rows, column, columns);
    case Activation::gelu:
      return finish_as<Tile, Activation::gelu>(call, sums, row, rows, column, columns);
    case Activation::gelu_fast:
      return finish_as<Tile, Activation::gelu_fast>(call, sums, row, rows, column, columns);
  }
}

// Tile::run<rows>(…) for a number of rows that is known only now.
template <class Tile, int R, class... Arguments>
void run_tile(int rows, Arguments... arguments) {
  if constexpr (R > 1) {
    if (rows < R) return run_tile<Tile, R - 1>(rows, arguments...);
  }
  Tile::template run<R>(arguments...);
}

constexpr int64_t kAnyDepth = INT32_MAX;  // of a Tile that takes all of K at once
constexpr int64_t kTilesAtOnce = 24;      // whose sums are kept from one part of K to the next

// Rows [row_begin, row_end) of A, which start at `a`, in panels [panel_begin, panel_end) of the call's list.
//
// Where half a panel is larger than the first cache holds beside the rows, all tiles pass by a part of it, of
// Tile::depth blocks of K, and then by the next: each goes on from its sums, so that these are the same.
template <class Tile>
void multiply_rows(const Gemm& call, const uint8_t* a, int64_t a_stride, int64_t row_begin, int64_t row_end,
                   int64_t panel_begin, int64_t panel_end) {
  const int64_t rows = row_end - row_begin;
  if (rows == 0) return;
  const int64_t tiles = (rows + Tile::rows - 1) / Tile::rows;
  constexpr int64_t sums_of_tile = Tile::rows * Tile::columns;
  alignas(64) typename Tile::Sum sums[(Tile::depth < kAnyDepth ? kTilesAtOnce : 1) * sums_of_tile];
  int64_t blocks = 0;
  for (int64_t i = 0; i < call.block_ranges; ++i) blocks += call.blocks[i].end - call.blocks[i].begin;
  const bool all_blocks = blocks == call.weights.blocks;  // else nobody knows the sums of the columns
  const bool in_parts = call.block_ranges == 1 && blocks > Tile::depth;
  const int64_t parts = in_parts ? (blocks + Tile::depth - 1) / Tile::depth : 1;
  const int64_t at_once = in_parts ? kTilesAtOnce : 1;
  for (int64_t i = panel_begin; i < panel_end; ++i) {
    const int64_t panel = call.panels == nullptr ? i : call.panels[i];
    const int64_t next = i + 1 == panel_end ? -1 : call.panels == nullptr ? i + 1 : call.panels[i + 1];
    const uint8_t* b = call.weights.panels + panel * call.weights.panel_bytes();
    Prefetch prefetch = {next < 0 ? b : call.weights.panels + next * call.weights.panel_bytes(), 0};
    if (next >= 0) prefetch.lines = static_cast<int>((kBlockBytes / 64 + tiles - 1) / tiles);
    for (int64_t half = 0; half < kPanelColumns && panel * kPanelColumns + half < call.weights.columns;
         half += Tile::columns) {
      const int64_t column = panel * kPanelColumns + half;
      for (int64_t first = 0; first < tiles; first += at_once) {
        const int64_t last = smaller(tiles, first + at_once);
        for (int64_t p = 0; p < parts; ++p) {
          BlockRange part = {};
          if (in_parts) {
            part.begin = static_cast<int32_t>(call.blocks[0].begin + p * Tile::depth);
            part.end = static_cast<int32_t>(smaller(call.blocks[0].end, part.begin + Tile::depth));
          }
          for (int64_t t = first; t < last; ++t) {
            const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;  // tiles of nearly equal height
            run_tile<Tile, Tile::rows>(
                static_cast<int>(end - begin), a + begin * a_stride, a_stride, b + half / 16 * kHalfBytes,
                all_blocks ? call.weights.column_sums + column : nullptr, in_parts ? &part : call.blocks,
                call.block_ranges, p > 0, prefetch, sums + (t - first) * sums_of_tile);
            prefetch.next += prefetch.lines * 64 * (in_parts ? part.end - part.begin : call.weights.blocks);
          }
        }
        for (int64_t t = first; t < last; ++t) {
          const int64_t begin = rows * t / tiles, end = rows * (t + 1) / tiles;
          finish<Tile>(call, sums + (t - first) * sums_of_tile, row_begin + begin, end - begin, column);
        }
      }
    }
  }
}

template <class Tile>
void gemm(const Gemm& call, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end, uint8_t*) {
  multiply_rows<Tile>(call, call.a + row_begin * call.a_stride, call.a_stride, row_begin, row_end, panel_begin,
                      panel_end);
}

}  // namespace
}  // namespace distilbert_fast
