// The entry of the int8_linear op; see distilbert_fast/ops/int8_linear.py.
#pragma once

#include <cstdint>

#include "cpu/gemm/gemm.h"

namespace distilbert_fast {

struct Int8Linear {
  const int8_t* x;  // codes [rows, k]
  int64_t x_row_stride, x_column_stride;
  const float* x_scale;  // [rows], or one value by stride 0
  int64_t x_scale_stride;
  const uint8_t* blob;  // from pack_linear; the scales and biases in it are not read
  int64_t blob_bytes;
  const float* scale;  // [columns]
  const float* bias;   // [columns] or null
  int64_t rows, columns, k;
  bool gelu;
  const void* residual;  // [rows, columns] or null
  int64_t residual_stride;
  bool residual_is_bfloat16;
  void* out;   // [rows, columns], contiguous
  int output;  // 0 float32, 1 bfloat16, 2 codes
  const float* out_scale;
  int64_t out_scale_stride;
};

// Throws std::invalid_argument before it touches memory.
void int8_linear(const Int8Linear& call, int threads);

}  // namespace distilbert_fast
