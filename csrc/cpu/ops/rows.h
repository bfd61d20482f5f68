// Arguments of the kernels that work row by row: quantize, layer_norm, embedding, cosine_loss. Included by kernels.h.
//
// Neighbours inside a row touch; rows lie a stride (in elements) apart. Row r of a call is row r of every matrix in it.
#pragma once

#include <cstdint>

namespace distilbert_fast {

enum class DType : int { float32 = 0, bfloat16 = 1 };

struct bfloat16 {
  uint16_t bits;
};

// int8 codes of rows and their scales; see ops/quantize.py. All null: none are wanted.
struct Codes {
  uint8_t* data;  // [rows, columns], or null
  int64_t stride;
  uint8_t flip;             // each code is stored XOR this: 0, or 0x80 for code + 128
  float* scale_out;         // [rows]: the scales that were used; or null
  const float* scale_in;    // the scales to use, one a row or one in all; null: each row's own is found
  int64_t scale_in_stride;  // 1 or 0
};

struct QuantizeRows {
  const void* x;  // [rows, columns]
  int64_t x_stride;
  DType x_dtype;
  int64_t columns;
  Codes codes;
};

constexpr int kFitSteps = 80;  // scales that are tried for a row

struct FitScaleRows {
  const void* w;  // [rows, columns]
  int64_t w_stride;
  DType w_dtype;
  int64_t columns;
  const float* importance;  // [columns]; null: 1
  float* scale;             // [rows]
};

// LayerNorm of rows h that a kernel makes: where its parameters come from and its results go.
struct Normalized {
  int64_t columns;
  const float* weight;  // [columns]
  const float* bias;    // [columns]
  double eps;
  void* y;  // [rows, columns], or null
  int64_t y_stride;
  DType y_dtype;
  bfloat16* y_low;  // a second copy of y, rounded; or null
  int64_t y_low_stride;
  float* mean;  // [rows], or null
  float* rstd;  // [rows], or null
  Codes codes;  // of y before it is rounded to y_dtype
};

// y may be the very memory of x or of residual, with the same stride and dtype.
struct LayerNormRows {
  const void* x;  // [rows, columns]
  int64_t x_stride;
  DType x_dtype;
  const void* residual;  // [rows, columns], or null
  int64_t residual_stride;
  DType residual_dtype;
  Normalized out;
};

// The gradients of the same.
struct NormalizedGradient {
  int64_t columns;
  const void* dy;  // [rows, columns]
  int64_t dy_stride;
  DType dy_dtype;
  const float* weight;  // [columns]
  const float* mean;    // [rows]
  const float* rstd;    // [rows]
  void* dh;             // [rows, columns] contiguous
  DType dh_dtype;
  float* sums = nullptr;  // [chunks, 2, columns]: each row's part of dweight and dbias is added to those of its chunk
};

constexpr int64_t kRowsOfSum = 64;  // row r belongs to chunk r / kRowsOfSum; a call begins with the first row of one

struct LayerNormGradientRows {
  const void* x;  // as in LayerNormRows
  int64_t x_stride;
  DType x_dtype;
  const void* residual;
  int64_t residual_stride;
  DType residual_dtype;
  NormalizedGradient gradient;
};

// A row of a table for each row of the call. Kernels follow the ids unchecked; the entry of the op checks them first.
struct Lookup {
  const void* ids;    // [rows]
  bool wide;          // ids are int64, else int32
  const void* table;  // [table_rows, columns], or null: nothing is looked up
  int64_t table_rows;
  int64_t stride;
  DType dtype;
};

struct EmbeddingRows {
  Lookup lookups[3];  // word, position, token type; the last may be null
  Normalized out;
};

// The same of int8 tables, without LayerNorm: out = Σ scale[id] · codes[id].
struct CodedLookup {
  const int64_t* ids;   // [rows]
  const int8_t* codes;  // [table rows, columns] contiguous, or null: nothing is looked up
  const float* scale;   // [table rows]
};

struct CodedRows {
  CodedLookup lookups[3];  // the last may be null
  int64_t columns;
  float* out;
  int64_t out_stride;
};

struct EmbeddingGradientRows {
  Lookup lookups[3];
  NormalizedGradient gradient;
};

// Hidden states of a student and of a teacher [rows, columns].
struct CosinePair {
  const void* student;
  const void* teacher;
  int64_t student_stride;
  int64_t teacher_stride;
  DType student_dtype;
  DType teacher_dtype;
  const bool* mask;  // [rows], true = counted; null counts all
  int64_t columns;
};

struct CosineForwardRows {
  CosinePair pair;
  float* loss;   // [rows]
  float* stats;  // [rows, 3]: c, a, b of ops/cosine_loss.py
};

struct CosineBackwardRows {
  CosinePair pair;
  const float* dloss;  // [rows]
  const float* stats;  // [rows, 3]
  void* gradient;      // [rows, columns] contiguous, dtype of the student
};

}  // namespace distilbert_fast
