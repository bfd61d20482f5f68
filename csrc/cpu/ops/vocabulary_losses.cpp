#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/ops/entries.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

// Throws std::invalid_argument before logits or outputs are touched if sizes, labels, pointers or temperature make no
// sense. Returns the slots of the call: the rows with a label, in order.
std::vector<int64_t> check_losses(const char* op, const VocabularyLosses& call) {
  const auto require = [op](bool holds, const char* expected, const std::string& given) {
    if (!holds) refuse(op, expected, given);
  };
  check_sizes(op, call.rows, call.columns);
  require(call.kl_rows >= 0 && call.kl_rows <= call.rows, "kl_rows must be from 0 to rows",
          std::to_string(call.kl_rows));
  require(call.columns >= 1, "columns must be 1 or more", std::to_string(call.columns));
  check_dtype(op, call.student_dtype);
  check_positive(op, "temperature", call.temperature);
  if (call.rows > 0) check_pointer(op, "student", call.student);
  if (call.kl_rows > 0) check_pointer(op, "kl", call.kl);
  if (call.rows > 0 && call.labels) check_pointer(op, "ce", call.ce);
  std::vector<int64_t> slots;
  int64_t labelled = 0;
  for (int64_t r = 0; call.labels && r < call.rows; ++r) {
    const int64_t label = call.labels[r];
    require(label >= -1 && label < call.columns, "labels must be from -1 (none) to columns - 1", std::to_string(label));
    slots.push_back(labelled);
    labelled += label >= 0 ? 1 : 0;
  }
  if (call.gradient && labelled > 0) check_pointer(op, "ce_gradient", call.ce_gradient);
  return slots;
}

}  // namespace

void linear_kl_div(LinearKlDivRows call, int threads) {
  const char* op = "linear_kl_div";
  const std::vector<int64_t> slots = check_losses(op, call.losses);
  check_dtype(op, call.teacher_dtype);
  if (call.losses.kl_rows > 0) check_pointer(op, "teacher", call.teacher);
  call.losses.slots = slots.data();
  parallel_rows(call.losses.rows, row_grain(call.losses.columns), threads, kernels().linear_kl_div, call);
}

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
