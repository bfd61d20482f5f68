#include "cpu/ops/linear_topk_kl_div.h"

#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/ops/vocabulary_losses.h"
#include "cpu/parallel.h"

namespace distilbert_fast {

void linear_topk_kl_div(LinearTopKKlDivRows call, int threads) {
  const char* op = "linear_topk_kl_div";
  const std::vector<int64_t> slots = check_losses(op, call.losses);
  const int64_t rows = call.losses.kl_rows, columns = call.losses.columns;
  if (call.kept < 1 || call.kept > columns) refuse(op, "kept must be from 1 to columns", std::to_string(call.kept));
  if (rows > 0) {
    check_pointer(op, "ids", call.ids);
    check_pointer(op, "log_p", call.log_p);
    check_pointer(op, "log_tail", call.log_tail);
  }
  for (int64_t i = 0; i < rows * call.kept; ++i) {
    if (call.ids[i] >= 0 && call.ids[i] < columns) continue;
    refuse(op, "ids must be from 0 to columns - 1", std::to_string(call.ids[i]));
  }
  call.losses.slots = slots.data();
  const Kernels& tier = kernels();
  parallel_rows(call.losses.rows, row_grain(columns), threads, 2 * call.kept * static_cast<int64_t>(sizeof(double)),
                [&](int64_t begin, int64_t end, void* scratch) { tier.linear_topk_kl_div(call, begin, end, scratch); });
}

}  // namespace distilbert_fast
