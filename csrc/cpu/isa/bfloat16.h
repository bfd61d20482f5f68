// Rounding to bfloat16 in baseline code.
#pragma once

#include <cstring>

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

inline bfloat16 to_bfloat16(float x) {  // round half to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + ((bits >> 16) & 1) + 0x7fff) >> 16)};
}

inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace distilbert_fast
