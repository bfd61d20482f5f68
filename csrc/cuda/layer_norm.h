// Launcher of layer_norm on a GPU, forward only: see ops/layer_norm.py for the contract, layer_norm.cu for the
// arithmetic. No CUDA header is needed to call it.
#pragma once

#include <cstdint>

namespace distilbert_fast {

struct LayerNorm {
  const void* x;  // [rows, columns], rows x_stride elements apart
  int64_t x_stride;
  const void* residual;  // [rows, columns], rows residual_stride elements apart; null adds nothing
  int64_t residual_stride;
  int dtype;            // of x, residual and y: 0 float32, 1 bfloat16, 2 float16
  const void* weight;   // [columns]
  const void* bias;     // [columns]
  int parameter_dtype;  // of weight and bias: float32, or that of x
  int64_t rows;
  int64_t columns;
  double eps;
  void* y;                // [rows, columns]
  float* mean;            // [rows]; null = not wanted
  float* rstd;            // [rows]; null = not wanted
  int8_t* codes;          // [rows, columns], of y before it is rounded; null = not wanted
  float* scale_out;       // [rows]: each row's own scale; null: scale_in is used
  const float* scale_in;  // one a row (scale_in_stride 1) or one in all (0)
  int64_t scale_in_stride;
};

// Queue the kernel on `stream` of `device` and return; nothing waits, so a graph can capture it. Throw
// std::invalid_argument if an argument makes no sense, std::runtime_error if CUDA refuses.
void layer_norm(const LayerNorm& call, int device, void* stream);

}  // namespace distilbert_fast
