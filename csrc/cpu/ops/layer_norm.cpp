#include "cpu/ops/entries.h"

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/ops/row_sums.h"
#include "cpu/parallel.h"

namespace distilbert_fast {

void layer_norm_forward(const LayerNormRows& call, int64_t rows, int threads) {
  check_sizes("layer_norm", rows, call.out.columns);
  for (const DType dtype : {call.x_dtype, call.residual_dtype, call.out.y_dtype}) check_dtype("layer_norm", dtype);
  check_positive("layer_norm", "eps", call.out.eps);
  if (rows == 0) return;
  if (call.out.columns > 0) {
    check_pointer("layer_norm", "x", call.x);
    check_pointer("layer_norm", "weight", call.out.weight);
    check_pointer("layer_norm", "bias", call.out.bias);
  }
  parallel_rows(rows, row_grain(call.out.columns), threads, kernels().layer_norm_forward, call);
}

void layer_norm_backward(const LayerNormGradientRows& call, int64_t rows, float* dweight, float* dbias, int threads) {
  check_gradient("layer_norm", call.gradient, rows, dweight, dbias);
  for (const DType dtype : {call.x_dtype, call.residual_dtype}) check_dtype("layer_norm", dtype);
  if (rows > 0 && call.gradient.columns > 0) check_pointer("layer_norm", "x", call.x);
  with_row_sums(call, rows, dweight, dbias, threads, kernels().layer_norm_backward);
}

}  // namespace distilbert_fast
