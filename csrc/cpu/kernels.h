// The CPU kernels and the table through which a tier of them is reached.
//
// A kernel is written once, over the vector type of vec_<isa>.h, and compiled once per tier in tier_<isa>.cpp with
// that tier's flags. Everything those files share has internal linkage: of two inline functions of one name the linker
// keeps either, and the AVX-512 one would crash the rest of the world.
#pragma once

#include <cstdint>

#include "rows.h"

namespace distilbert_fast {

// Two matrices of logits [rows, columns]; neighbours inside a row touch, rows lie a stride (in elements) apart.
struct KlDivLogits {
  const void* student;
  const void* teacher;
  int64_t student_stride;
  int64_t teacher_stride;
  DType student_dtype;
  DType teacher_dtype;
  const bool* mask;  // [rows], true = counted; null counts all
  int64_t rows;
  int64_t columns;
  double temperature;
};

struct KlDivForward {
  KlDivLogits logits;
  double gradient_scale;  // 1 / counted rows for a mean, else 1
  float* loss;            // [rows]
  float* stats;           // [rows, 4]: max and Z = Σ exp((x − max)/τ) of student and of teacher; or null
  void* gradient;         // [rows, columns] contiguous, dtype of the student; or null
  bool stream;            // the gradient is larger than the caches: write around them
};

struct KlDivBackward {
  KlDivLogits logits;
  const float* dloss;  // [rows]
  const float* stats;  // [rows, 4]
  void* gradient;      // as above
  bool stream;
};

// One entry per kernel; each works on the rows [begin, end).
struct Kernels {
  void (*kl_div_forward)(const KlDivForward&, int64_t begin, int64_t end);
  void (*kl_div_backward)(const KlDivBackward&, int64_t begin, int64_t end);
  void (*quantize)(const QuantizeRows&, int64_t begin, int64_t end);
  void (*layer_norm_forward)(const LayerNormRows&, int64_t begin, int64_t end);
  void (*embedding_forward)(const EmbeddingRows&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormGradientRows&, int64_t begin, int64_t end);
  void (*embedding_backward)(const EmbeddingGradientRows&, int64_t begin, int64_t end);
  void (*cosine_loss_forward)(const CosineForwardRows&, int64_t begin, int64_t end);
  void (*cosine_loss_backward)(const CosineBackwardRows&, int64_t begin, int64_t end);
};

extern const Kernels kernels_scalar;
#ifndef DISTILBERT_FAST_SCALAR_ONLY
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace distilbert_fast
