// Linear layers by AMX: the sums of 32 rows and a panel of 32 columns stay in four tiles through all of K.
//
//     tmm4 A rows  0-15    tmm0 tmm1        tmm6 B columns 0-15, tmm7 B columns 16-31
//     tmm5 A rows 16-31    tmm2 tmm3        a block of K is one tile: 64 bytes of a row of A, half a block of B
//
// While tiles are multiplied, the vector units finish the sums before them, a few rows with each block of K: that costs
// no time of its own as long as it takes less than the products.
#pragma once

#include "cpu/gemm/tiles.h"

namespace distilbert_fast {
namespace {

// All eight tiles are 16 rows of 64 bytes from here on, on this thread, until it releases them.
inline void configure_tiles() {
  uint8_t configuration[64] = {1};  // the palette
  for (int i = 0; i < 8; ++i) {
    configuration[16 + 2 * i] = 64;  // bytes of a row, in 16 bits
    configuration[48 + i] = 16;      // rows
  }
  tile_configure(configuration);
}

struct AmxInt8 {
  using Sum = int32_t;
  static constexpr bool quantized = true;
  static constexpr int columns = kPanelColumns;
  template <int C, int A, int B>
  static void multiply() {
    tile_multiply_int8<C, A, B>();
  }
};

struct AmxBFloat16 {
  using Sum = float;
  static constexpr bool quantized = false;
  static constexpr int columns = kPanelColumns;
  template <int C, int A, int B>
  static void multiply() {
    tile_multiply_bfloat16<C, A, B>();
  }
};

constexpr int64_t kAmxRows = 16;
constexpr int64_t kAmxRowBytes = 64;

// Sums that are multiplied and not yet finished.
template <class Format>
struct Unfinished {
  const Gemm* call;
  const typename Format::Sum* sums = nullptr;
  int64_t row = 0, rows = 0, column = 0;

  void some(int64_t n) {
    if (n > rows) n = rows;
    if (n == 0) return;
    finish<Format>(*call, sums, row, n, column);
    sums += n * Format::columns;
    row += n;
    rows -= n;
  }
};

// The products of 32 rows of A (one tile: of 16) with a panel, into `out`.
template <class Format, bool kTwoTiles>
void multiply_tiles(const Gemm& call, const uint8_t* a, const uint8_t* b, Prefetch prefetch, int64_t rows_a_block,
                    Unfinished<Format>& before, typename Format::Sum* out) {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (kTwoTiles) {
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t i = 0; i < call.block_ranges; ++i) {
    const BlockRange range = call.blocks[i];
    const uint8_t* x = a + range.begin * kAmxRowBytes;
    const uint8_t* w = b + range.begin * kBlockBytes;
    for (int64_t k = range.begin; k < range.end; ++k, x += kAmxRowBytes, w += kBlockBytes) {
      tile_load<6>(w, kAmxRowBytes);
      tile_load<4>(x, call.a_stride);
      Format::template multiply<0, 4, 6>();
      tile_load<7>(w + kHalfBytes, kAmxRowBytes);
      Format::template multiply<1, 4, 7>();
      if constexpr (kTwoTiles) {
        tile_load<5>(x + kAmxRows * call.a_stride, call.a_stride);
        Format::template multiply<2, 5, 6>();
        Format::template multiply<3, 5, 7>();
      }
      prefetch.some();
      before.some(rows_a_block);
    }
  }
  before.some(before.rows);
  constexpr int64_t stride = Format::columns * sizeof(typename Format::Sum);
  tile_store<0>(out, stride);
  tile_store<1>(out + 16, stride);
  if constexpr (kTwoTiles) {
    tile_store<2>(out + kAmxRows * Format::columns, stride);
    tile_store<3>(out + kAmxRows * Format::columns + 16, stride);
  }
}

template <class Format, class Panels = StoredPanels>
void gemm_amx(const Gemm& call, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
              uint8_t* memory) {
  if (row_begin == row_end) return;
  configure_tiles();
  alignas(64) typename Format::Sum sums[2][kRowUnit * Format::columns];
  Unfinished<Format> before = {&call};
  int64_t blocks = 0;
  for (int64_t i = 0; i < call.block_ranges; ++i) blocks += call.blocks[i].end - call.blocks[i].begin;
  const int64_t rows_a_block = blocks == 0 ? 0 : (kRowUnit + blocks - 1) / blocks;
  const int64_t units = (row_end - row_begin + kRowUnit - 1) / kRowUnit;
  int buffer = 0;
  for_each_panel(call, panel_begin, panel_end, units + Panels::passes, [&](int64_t panel, Prefetch prefetch) {
    uint8_t* scratch = memory;
    const uint8_t* b = Panels::panel(call, panel, prefetch, scratch);
    for (int64_t row = row_begin; row < row_end; row += kRowUnit, buffer ^= 1) {
      const int64_t rows = row_end - row < kRowUnit ? row_end - row : kRowUnit;
      const uint8_t* a = call.a + row * call.a_stride;
      if (rows > kAmxRows) {
        multiply_tiles<Format, true>(call, a, b, prefetch, rows_a_block, before, sums[buffer]);
      } else {
        multiply_tiles<Format, false>(call, a, b, prefetch, rows_a_block, before, sums[buffer]);
      }
      prefetch.next += prefetch.lines * 64 * call.weights.blocks;
      before = {&call, sums[buffer], row, rows, panel * kPanelColumns};
    }
  });
  before.some(before.rows);
  tile_release();
}

// For attention_pairs.h. It reads and writes whole tiles of rows.
struct TileProduct {
  static void begin() { configure_tiles(); }
  static void end() { tile_release(); }

  static void multiply(const uint8_t* a, int64_t a_stride, int64_t rows, const uint8_t* panel, int64_t blocks,
                       float* out, int64_t out_stride) {
    rows > kAmxRows ? of_tiles<true>(a, a_stride, panel, blocks, out, out_stride * 4)
                    : of_tiles<false>(a, a_stride, panel, blocks, out, out_stride * 4);
  }

 private:
  template <bool kTwoTiles>
  static void of_tiles(const uint8_t* a, int64_t a_stride, const uint8_t* panel, int64_t blocks, float* out,
                       int64_t out_bytes) {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (kTwoTiles) {
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int64_t k = 0; k < blocks; ++k, a += kAmxRowBytes, panel += kBlockBytes) {
      tile_load<6>(panel, kAmxRowBytes);
      tile_load<4>(a, a_stride);
      tile_multiply_bfloat16<0, 4, 6>();
      tile_load<7>(panel + kHalfBytes, kAmxRowBytes);
      tile_multiply_bfloat16<1, 4, 7>();
      if constexpr (kTwoTiles) {
        tile_load<5>(a + kAmxRows * a_stride, a_stride);
        tile_multiply_bfloat16<2, 5, 6>();
        tile_multiply_bfloat16<3, 5, 7>();
      }
    }
    tile_store<0>(out, out_bytes);
    tile_store<1>(out + 16, out_bytes);
    if constexpr (kTwoTiles) {
      float* below = out + kAmxRows * (out_bytes / 4);
      tile_store<2>(below, out_bytes);
      tile_store<3>(below + 16, out_bytes);
    }
  }
};

}  // namespace
}  // namespace distilbert_fast
