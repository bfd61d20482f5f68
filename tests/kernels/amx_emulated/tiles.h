// In the place of csrc/cpu/gemm/tiles.h: the same functions in plain C++, as Intel's manual describes the instructions
// (Software Developer's Manual, volume 2), for a machine without AMX. What would fault there ends the process here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulated.h"

namespace distilbert_fast {
namespace {

struct EmulatedTiles {
  bool configured = false;
  int rows[8], row_bytes[8];
  uint8_t data[8][16][64];
  ~EmulatedTiles() {
    if (configured) emulated::fault("a thread ended with its tiles configured");
  }
};

thread_local EmulatedTiles tiles_of_thread;

inline EmulatedTiles& configured_tiles() {
  if (!tiles_of_thread.configured) emulated::fault("a tile is used and none is configured");
  return tiles_of_thread;
}

inline void tile_configure(const uint8_t (&configuration)[64]) {
  EmulatedTiles& tiles = tiles_of_thread;
  if (configuration[0] != 1) emulated::fault("the palette must be 1");
  for (int i = 1; i < 16; ++i) {  // the row to start from is 0, the others are reserved
    if (configuration[i] != 0) emulated::fault("a reserved byte of the configuration is set");
  }
  for (int t = 0; t < 16; ++t) {
    const int rows = configuration[48 + t], row_bytes = configuration[16 + 2 * t] | configuration[17 + 2 * t] << 8;
    if (t >= 8 && (rows != 0 || row_bytes != 0)) emulated::fault("there are eight tiles");
    if (rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0)) emulated::fault("no such tile");
    if (t < 8) tiles.rows[t] = rows, tiles.row_bytes[t] = row_bytes;
  }
  std::memset(tiles.data, 0, sizeof tiles.data);
  if (!tiles.configured) ++emulated::threads_with_tiles;
  tiles.configured = true;
}

inline void tile_release() {
  if (tiles_of_thread.configured) --emulated::threads_with_tiles;
  tiles_of_thread.configured = false;
}

template <int T>
inline void tile_zero() {
  std::memset(configured_tiles().data[T], 0, sizeof tiles_of_thread.data[T]);
}

template <int T>
inline void tile_load(const void* rows, int64_t stride) {
  EmulatedTiles& tiles = configured_tiles();
  std::memset(tiles.data[T], 0, sizeof tiles.data[T]);
  for (int r = 0; r < tiles.rows[T]; ++r) {
    std::memcpy(tiles.data[T][r], static_cast<const uint8_t*>(rows) + r * stride,
                static_cast<size_t>(tiles.row_bytes[T]));
  }
}

template <int T>
inline void tile_store(void* rows, int64_t stride) {
  const EmulatedTiles& tiles = configured_tiles();
  for (int r = 0; r < tiles.rows[T]; ++r) {
    std::memcpy(static_cast<uint8_t*>(rows) + r * stride, tiles.data[T][r], static_cast<size_t>(tiles.row_bytes[T]));
  }
}

// C [m, n] += A [m, k] · B [k, n] of 32-bit groups.
template <int C, int A, int B>
inline EmulatedTiles& tiles_that_fit() {
  static_assert(C != A && C != B && A != B, "three different tiles");
  EmulatedTiles& tiles = configured_tiles();
  const bool fit = tiles.rows[C] == tiles.rows[A] && tiles.row_bytes[C] == tiles.row_bytes[B] &&
                   tiles.row_bytes[A] == 4 * tiles.rows[B] && tiles.row_bytes[A] % 4 == 0 &&
                   tiles.row_bytes[C] % 4 == 0;
  if (!fit) emulated::fault("the shapes of the tiles do not fit");
  ++emulated::multiplications;
  return tiles;
}

template <int C, int A, int B>
inline void tile_multiply_int8() {
  EmulatedTiles& tiles = tiles_that_fit<C, A, B>();
  for (int m = 0; m < tiles.rows[C]; ++m) {
    for (int n = 0; n < tiles.row_bytes[C] / 4; ++n) {
      uint32_t sum;  // wraps around
      std::memcpy(&sum, &tiles.data[C][m][n * 4], 4);
      for (int k = 0; k < tiles.row_bytes[A]; ++k) {
        const int a = static_cast<int8_t>(tiles.data[A][m][k]);
        const int b = static_cast<int8_t>(tiles.data[B][k / 4][n * 4 + k % 4]);
        sum += static_cast<uint32_t>(a * b);
      }
      std::memcpy(&tiles.data[C][m][n * 4], &sum, 4);
    }
  }
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float bfloat16_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

// Even and odd elements of K are summed apart, by fused multiply-adds that round half to even, then added to C.
template <int C, int A, int B>
inline void tile_multiply_bfloat16() {
  EmulatedTiles& tiles = tiles_that_fit<C, A, B>();
  for (int m = 0; m < tiles.rows[C]; ++m) {
    for (int n = 0; n < tiles.row_bytes[C] / 4; ++n) {
      float sums[2] = {0.0f, 0.0f}, sum;
      for (int k = 0; k < tiles.row_bytes[A] / 4; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float a = bfloat16_at(&tiles.data[A][m][k * 4 + i * 2]);
          const float b = bfloat16_at(&tiles.data[B][k][n * 4 + i * 2]);
          sums[i] = flushed(std::fma(a, b, sums[i]));
        }
      }
      std::memcpy(&sum, &tiles.data[C][m][n * 4], 4);
      sum = flushed(flushed(sum) + flushed(sums[0] + sums[1]));
      std::memcpy(&tiles.data[C][m][n * 4], &sum, 4);
    }
  }
}

}  // namespace
}  // namespace distilbert_fast
