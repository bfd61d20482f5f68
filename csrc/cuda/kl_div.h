// Launchers of kl_div on a GPU: see ops/kl_div.py for the contract, kl_div.cu for the arithmetic. No CUDA header is
// needed to call them.
#pragma once

#include <cstdint>

namespace distilbert_fast {

struct KlDivLogits {
  const void* student;  // [rows, columns], rows student_stride elements apart
  const void* teacher;  // [rows, columns], rows teacher_stride elements apart
  int64_t student_stride;
  int64_t teacher_stride;
  int student_dtype;  // 0 float32, 1 bfloat16, 2 float16
  int teacher_dtype;
  const bool* mask;  // [rows], true = counted; null counts all
  int64_t rows;
  int64_t columns;
  double temperature;
};

struct KlDivForward {
  KlDivLogits logits;
  const float* scale;  // one number on the device that multiplies the gradient
  float* loss;         // [rows], not scaled
  float* stats;        // [rows, 4]: max and Z = Σ exp((x − max)/τ) of student and of teacher; null = not wanted
  void* gradient;      // [rows, columns] of the student's dtype; null = not wanted
};

struct KlDivBackward {
  KlDivLogits logits;
  const float* dloss;  // [rows]
  const float* stats;  // [rows, 4], of the forward pass
  void* gradient;      // [rows, columns] of the student's dtype
};

// Queue the kernel on `stream` of `device` and return; nothing waits, so a graph can capture it. Throw
// std::invalid_argument if an argument makes no sense, std::runtime_error if CUDA refuses.
void kl_div_forward(const KlDivForward& call, int device, void* stream);
void kl_div_backward(const KlDivBackward& call, int device, void* stream);

}  // namespace distilbert_fast
