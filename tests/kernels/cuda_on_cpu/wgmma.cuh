// csrc/cuda/wgmma.cuh on the CPU. Descriptors are read bit by bit as the hardware does. A product is computed as late
// as it may be, when its group is waited for, so that neither operands that are overwritten too early nor accumulators
// that are used too early can pass; and it is an error where a thread has copies that it has not fenced.
#pragma once

#include "mma.cuh"

namespace distilbert_fast {

inline void fence_proxy_async() { emulated::me().unfenced = false; }
inline void wgmma_fence() {}

inline void wgmma_commit() { ++emulated::me().product_groups; }

// Byte `k` of row `row` of a matrix whose rows run along K, swizzled in units of 128 bytes by 8 rows.
inline int8_t code_at(uint64_t descriptor, unsigned row, unsigned k) {
  const uint64_t start = (descriptor & 0x3fff) << 4, between_8_rows = (descriptor >> 32 & 0x3fff) << 4;
  const bool swizzled_by_128 = descriptor >> 62 == 1, based_at_0 = (descriptor >> 49 & 7) == 0;
  uint64_t at = start + row / 8 * between_8_rows + row % 8 * 128 + k;
  at ^= (at >> 7 & 7) << 4;
  if (!swizzled_by_128 || !based_at_0 || at >= emulated::shared.size) emulated::fail(cudaErrorIllegalAddress);
  return static_cast<int8_t>(emulated::shared.data[at]);
}

inline void wgmma_m64n128k32(int32_t (&d)[64], uint64_t a, uint64_t b) {
  for (const auto& thread : emulated::threads) {
    if (thread.unfenced) emulated::fail(cudaErrorLaunchFailure);
  }
  const auto multiply = [&d, a, b, warp = emulated::current / 32 % 4, lane = emulated::lane()] {
    for (unsigned i = 0; i < 64; ++i) {
      const unsigned row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      for (unsigned k = 0; k < 32; ++k) d[i] += code_at(a, row, k) * code_at(b, column, k);
    }
  };
  emulated::me().products.push_back({multiply, emulated::me().product_groups});
}

template <int n>
void wgmma_wait(int32_t (&)[64]) {
  auto& products = emulated::me().products;
  while (!products.empty() && products.front().group + n < emulated::me().product_groups) {
    products.front().compute();
    products.pop_front();
  }
}

}  // namespace distilbert_fast
