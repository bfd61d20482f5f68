// The products of a linear layer in float32, forward and backward; see distilbert_fast/ops/linear.py.
#pragma once

#include <cstdint>

namespace distilbert_fast {

// out [rows, columns] = A [rows, k] · Bᵀ + bias, B [columns, k]. Element (r, i) of A lies at a[r · a_row + i · a_step],
// of B likewise; one stride of each is 1.
struct LinearProduct {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_row, b_step;
  const float* bias;  // [columns] or null
  int64_t rows, columns, k;
  float* out;  // contiguous
  bool add;    // to what out holds
};

// Throws std::invalid_argument before it touches memory.
void linear_product(const LinearProduct& call, int threads);

}  // namespace distilbert_fast
