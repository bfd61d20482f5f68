// Launcher of int8_linear on a GPU: see ops/int8_linear.py for the contract, int8_linear.cu for the arithmetic. No CUDA
// header is needed to call it.
#pragma once

#include <cstdint>

namespace distilbert_fast {

struct Int8Linear {
  const int8_t* x;  // [rows, depth], rows x_stride elements apart
  int64_t x_stride;
  const float* x_scale;  // one a row (x_scale_stride 1) or one in all (0)
  int64_t x_scale_stride;
  const int8_t* w;  // [columns, depth], rows w_stride elements apart
  int64_t w_stride;
  const float* w_scale;  // [columns]
  const void* bias;      // [columns]; null adds nothing
  int bias_dtype;        // 0 float32, 1 bfloat16, 2 float16
  int64_t rows;
  int64_t columns;
  int64_t depth;
  bool gelu;
  const void* residual;  // [rows, columns], rows residual_stride elements apart; null adds nothing
  int64_t residual_stride;
  int residual_dtype;
  void* y;                 // [rows, columns]
  int y_dtype;             // of the three, or 3 int8
  const float* out_scale;  // of codes: one a row (out_scale_stride 1) or one in all (0)
  int64_t out_scale_stride;
};

// Queue the kernel on `stream` of `device` and return; nothing waits, so a graph can capture it. Throw
// std::invalid_argument if an argument makes no sense, std::runtime_error if CUDA refuses.
void int8_linear(const Int8Linear& call, int device, void* stream);

}  // namespace distilbert_fast
