// In the place of csrc/cpu/gemm/vpdpbusd.h: the same function in plain C++, as Intel's manual describes the instruction
// (Software Developer's Manual, volume 2), for a machine without AVX-VNNI.
#pragma once

#include <cstdint>
#include <cstring>

namespace distilbert_fast {
namespace {

inline __m256i plus_byte_products(__m256i sum, uint32_t group, __m256i w) {
  uint8_t codes[4];
  int8_t weights[32];
  uint32_t sums[8];  // wrap around
  std::memcpy(codes, &group, sizeof codes);
  std::memcpy(weights, &w, sizeof weights);
  std::memcpy(sums, &sum, sizeof sums);
  for (int i = 0; i < 32; ++i) sums[i / 4] += static_cast<uint32_t>(int{codes[i % 4]} * int{weights[i]});
  std::memcpy(&sum, sums, sizeof sum);
  return sum;
}

inline void add_byte_products(__m256i& low, __m256i& high, const uint32_t& group, __m256i w0, __m256i w1) {
  low = plus_byte_products(low, group, w0);
  high = plus_byte_products(high, group, w1);
}

}  // namespace
}  // namespace distilbert_fast
