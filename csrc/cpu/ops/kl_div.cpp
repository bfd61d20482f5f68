#include "cpu/ops/entries.h"

#include <string>

#include "cpu/buffer.h"
#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

void require(bool holds, const char* expected, const std::string& given) {
  if (!holds) refuse("kl_div", expected, given);
}

void check(const KlDivLogits& logits) {
  require(logits.columns >= 1 || logits.rows <= 0, "columns must be 1 or more", std::to_string(logits.columns));
  check_sizes("kl_div", logits.rows, logits.columns);
  for (const DType dtype : {logits.student_dtype, logits.teacher_dtype}) check_dtype("kl_div", dtype);
  check_positive("kl_div", "temperature", logits.temperature);
  const bool present = logits.student != nullptr && logits.teacher != nullptr;
  require(logits.rows == 0 || present, "student and teacher must point to logits", "null");
}

bool large(const KlDivLogits& logits, const void* gradient) {
  const int64_t element = logits.student_dtype == DType::float32 ? 4 : 2;
  return gradient != nullptr && logits.rows * logits.columns * element >= kLargeBytes;
}

int64_t counted(const KlDivLogits& logits) {
  if (logits.mask == nullptr) return logits.rows;
  int64_t n = 0;
  for (int64_t r = 0; r < logits.rows; ++r) n += logits.mask[r] ? 1 : 0;
  return n;
}

}  // namespace

void kl_div_forward(KlDivForward call, bool mean, int threads) {
  check(call.logits);
  if (call.logits.rows == 0) return;
  require(call.loss != nullptr, "loss must point to memory", "null");
  const int64_t n = counted(call.logits);
  call.gradient_scale = mean && n > 0 ? 1.0 / static_cast<double>(n) : 1.0;
  call.stream = large(call.logits, call.gradient);
  parallel_rows(call.logits.rows, row_grain(call.logits.columns), threads, kernels().kl_div_forward, call);
}

void kl_div_backward(KlDivBackward call, int threads) {
  check(call.logits);
  if (call.logits.rows == 0) return;
  const bool present = call.dloss != nullptr && call.stats != nullptr && call.gradient != nullptr;
  require(present, "dloss, stats and gradient must point to memory", "null");
  call.stream = large(call.logits, call.gradient);
  parallel_rows(call.logits.rows, row_grain(call.logits.columns), threads, kernels().kl_div_backward, call);
}

}  // namespace distilbert_fast
