// Laying out weights for the kernels of gemm.h.
#pragma once

#include <cstdint>

#include "cpu/gemm/gemm.h"

namespace distilbert_fast {

// Bytes of the blob that holds W [columns, k] and its sums, scales and biases. Throws std::invalid_argument.
int64_t packed_bytes(Weights kind, int64_t columns, int64_t k);

// Where things lie in such a blob.
PackedLinear packed_linear(Weights kind, const uint8_t* blob, int64_t columns, int64_t k);

// The same for a blob of so many bytes; throws std::invalid_argument if these are not as many as it takes.
PackedLinear checked_linear(Weights kind, const uint8_t* blob, int64_t blob_bytes, int64_t columns, int64_t k);

// Fill a blob. Element (f, c) of W lies at f · row_stride + c · column_stride, in elements: int8 for int8, float32 for
// float32; for bfloat16 either, rounded half to even from float32; for codebook16 uint8 codes, each below 16. Null:
// scales are 1, biases 0.
struct PackSource {
  const void* weights;
  bool is_float32;
  int64_t row_stride;
  int64_t column_stride;
  const float* scale;               // [columns]
  const float* bias;                // [columns]
  const uint8_t* tables = nullptr;  // [columns / 4, 16] of int8: the values of codebook16
};
void pack_linear(Weights kind, const PackSource& source, int64_t columns, int64_t k, uint8_t* blob, int64_t blob_bytes);

}  // namespace distilbert_fast
