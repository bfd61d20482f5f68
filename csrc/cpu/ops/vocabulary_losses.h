// What the checked entries of linear_kl_div and linear_topk_kl_div refuse alike. Included by these two alone.
#pragma once

#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throws std::invalid_argument before logits or outputs are touched if sizes, labels, pointers or temperature make no
// sense. Returns the slots of the call: the rows with a label, in order.
inline std::vector<int64_t> check_losses(const char* op, const VocabularyLosses& call) {
  const auto require = [op](bool holds, const char* expected, const std::string& given) {
    if (!holds) refuse(op, expected, given);
  };
  require(call.rows >= 0, "rows must be 0 or more", std::to_string(call.rows));
  require(call.kl_rows >= 0 && call.kl_rows <= call.rows, "kl_rows must be from 0 to rows",
          std::to_string(call.kl_rows));
  require(call.columns >= 1, "columns must be 1 or more", std::to_string(call.columns));
  check_sizes(op, call.rows, call.columns);
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

}  // namespace distilbert_fast
