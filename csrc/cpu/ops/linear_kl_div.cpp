#include "cpu/ops/linear_kl_div.h"

#include <vector>

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/ops/vocabulary_losses.h"
#include "cpu/parallel.h"

namespace distilbert_fast {

void linear_kl_div(LinearKlDivRows call, int threads) {
  const char* op = "linear_kl_div";
  const std::vector<int64_t> slots = check_losses(op, call.losses);
  check_dtype(op, call.teacher_dtype);
  if (call.losses.kl_rows > 0) check_pointer(op, "teacher", call.teacher);
  call.losses.slots = slots.data();
  const Kernels& tier = kernels();
  parallel_rows(call.losses.rows, row_grain(call.losses.columns), threads,
                [&](int64_t begin, int64_t end) { tier.linear_kl_div(call, begin, end); });
}

}  // namespace distilbert_fast
