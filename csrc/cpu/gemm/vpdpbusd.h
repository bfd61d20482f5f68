// The instruction of AVX-VNNI.
//
// It is written out, with the loads that go with it and in their order: left to itself gcc 12 loads weights again for
// each row, or spills sums.
#pragma once

#include <cstdint>

namespace distilbert_fast {
namespace {

// low += group · w0 and high += group · w1: in each of the eight places of int32 the four products of unsigned by
// signed bytes, wrapping around. A group is four codes, the same for all places. VEX: a processor without AVX-512 has
// it.
inline __attribute__((always_inline)) void add_byte_products(__m256i& low, __m256i& high, const uint32_t& group,
                                                             __m256i w0, __m256i w1) {
  __m256i codes;
  __asm__ volatile(
      "vpbroadcastd %[group], %[codes]\n\t"
      "%{vex%} vpdpbusd %[w0], %[codes], %[low]\n\t"
      "%{vex%} vpdpbusd %[w1], %[codes], %[high]"
      : [codes] "=&x"(codes), [low] "+x"(low), [high] "+x"(high)
      : [group] "m"(group), [w0] "x"(w0), [w1] "x"(w1));
}

}  // namespace
}  // namespace distilbert_fast
