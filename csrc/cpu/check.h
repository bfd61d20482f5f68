// What every checked entry of row-wise kernels refuses, in one wording: "op: argument must be …, got …".
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

constexpr int64_t kGrainElements = 32768;  // work worth waking a thread for

[[noreturn]] inline void refuse(const char* op, const std::string& expected, const std::string& given) {
  throw std::invalid_argument(std::string(op) + ": " + expected + ", got " + given);
}

inline void check_sizes(const char* op, int64_t rows, int64_t columns) {
  if (rows < 0) refuse(op, "rows must be 0 or more", std::to_string(rows));
  if (columns < 0) refuse(op, "columns must be 0 or more", std::to_string(columns));
  if (columns > INT64_MAX / 8 / (rows + 1)) {
    refuse(op, "rows · columns must fit in 60 bits", std::to_string(rows) + " · " + std::to_string(columns));
  }
}

inline void check_dtype(const char* op, DType dtype) {
  if (dtype == DType::float32 || dtype == DType::bfloat16) return;
  refuse(op, "dtype must be 0 (float32) or 1 (bfloat16)", std::to_string(static_cast<int>(dtype)));
}

inline void check_pointer(const char* op, const char* argument, const void* pointer) {
  if (pointer == nullptr) refuse(op, std::string(argument) + " must point to memory", "null");
}

inline void check_positive(const char* op, const char* argument, double value) {
  if (std::isfinite(value) && value > 0) return;
  refuse(op, std::string(argument) + " must be finite and above 0", std::to_string(value));
}

// Rows that are worth a thread together.
inline int64_t row_grain(int64_t columns) { return 1 + kGrainElements / (columns + 1); }

}  // namespace distilbert_fast
