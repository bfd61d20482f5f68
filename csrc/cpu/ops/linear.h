// The products of a linear layer, forward and backward; see distilbert_fast/ops/linear.py.
#pragma once

#include <cstdint>

#include "cpu/ops/rows.h"

namespace distilbert_fast {

// out [rows, columns] = A [rows, k] · Bᵀ + bias, B [columns, k]. Element (r, i) of A lies at a[r · a_row + i · a_step],
// of B likewise; one stride of each is 1. In float32 if all three are; else what is not yet bfloat16 is rounded to it,
// and sums are float32: that takes a tier that multiplies bfloat16.
struct LinearProduct {
  const void* a;
  DType a_dtype;
  int64_t a_row, a_step;
  const void* b;
  DType b_dtype;
  int64_t b_row, b_step;
  const float* bias;  // [columns] or null
  int64_t rows, columns, k;
  void* out;  // contiguous
  DType out_dtype;
  bool add;  // to what out holds
};

// Whether the tier in use has products of bfloat16.
bool multiplies_bfloat16();

// Throws std::invalid_argument before it touches memory.
void linear_product(const LinearProduct& call, int threads);

}  // namespace distilbert_fast
