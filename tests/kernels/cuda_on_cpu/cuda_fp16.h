#pragma once

#include <immintrin.h>

#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
inline __half __float2half_rn(float value) { return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)}; }

namespace emulated {
inline double value(__half x) { return __half2float(x); }
}  // namespace emulated
