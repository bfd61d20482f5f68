#include "linear_kl_div.h"

#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "isa.h"
#include "parallel.h"

namespace distilbert_fast {
namespace {

void require(bool holds, const char* expected, const std::string& given) {
  if (!holds) refuse("linear_kl_div", expected, given);
}

void check(const LinearKlDivRows& call) {
  require(call.rows >= 0, "rows must be 0 or more", std::to_string(call.rows));
  require(call.kl_rows >= 0 && call.kl_rows <= call.rows, "kl_rows must be from 0 to rows",
          std::to_string(call.kl_rows));
  require(call.columns >= 1, "columns must be 1 or more", std::to_string(call.columns));
  require(call.columns <= INT64_MAX / 8 / (call.rows + 1), "rows · columns must fit in 60 bits",
          std::to_string(call.rows) + " · " + std::to_string(call.columns));
  for (const DType dtype : {call.student_dtype, call.teacher_dtype}) {
    require(dtype == DType::float32 || dtype == DType::bfloat16, "dtype must be 0 (float32) or 1 (bfloat16)",
            std::to_string(static_cast<int>(dtype)));
  }
  require(std::isfinite(call.temperature) && call.temperature > 0, "temperature must be finite and above 0",
          std::to_string(call.temperature));
  require(call.rows == 0 || call.student, "student must point to logits", "null");
  require(call.kl_rows == 0 || (call.teacher && call.kl), "teacher and kl must point to memory", "null");
  require(!call.labels || call.rows == 0 || call.ce, "ce must point to memory", "null");
}

}  // namespace

void linear_kl_div(LinearKlDivRows call, int threads) {
  check(call);
  std::vector<int64_t> slots;
  int64_t labelled = 0;
  for (int64_t r = 0; call.labels && r < call.rows; ++r) {
    const int64_t label = call.labels[r];
    require(label >= -1 && label < call.columns, "labels must be from -1 (none) to columns - 1", std::to_string(label));
    slots.push_back(labelled);
    labelled += label >= 0 ? 1 : 0;
  }
  require(!call.gradient || labelled == 0 || call.ce_gradient, "ce_gradient must point to memory", "null");
  if (!call.gradient) call.ce_gradient = nullptr;
  call.slots = slots.data();
  const Kernels& tier = kernels();
  parallel_rows(call.rows, 1 + kGrainElements / call.columns, threads,
                [&](int64_t begin, int64_t end) { tier.linear_kl_div(call, begin, end); });
}

}  // namespace distilbert_fast
