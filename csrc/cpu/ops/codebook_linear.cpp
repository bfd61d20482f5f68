#include <algorithm>
#include <string>

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

constexpr const char* kOp = "codebook_linear";
constexpr int64_t kColumnUnit = 32;          // whole vectors of every tier
constexpr int64_t kGroupBytes = 192 << 10;   // of weights that stay in a second cache while rows pass by
constexpr int64_t kRowsWorthExpanding = 64;  // for so many, weights may be looked up once more

void check(const CodebookLinear& call) {
  const auto given = [&] {
    return std::to_string(call.rows) + ", " + std::to_string(call.columns) + " and " + std::to_string(call.depth);
  };
  if (std::min({call.rows, call.columns, call.depth}) < 0) {
    refuse(kOp, "rows, columns and depth must be 0 or more", given());
  }
  if (std::max({call.rows, call.columns, call.depth}) > INT32_MAX) {
    refuse(kOp, "rows, columns and depth must fit in 31 bits", given());
  }
  check_dtype(kOp, call.dtype);
  if (call.values < 0 || call.values > 256) {
    refuse(kOp, "codebook must be of at most 256 values", std::to_string(call.values));
  }
  if (call.bits != 4 && call.bits != 6 && call.bits != 8)
    refuse(kOp, "bits must be 4, 6 or 8", std::to_string(call.bits));
  if (call.group < 1) refuse(kOp, "group must be 1 or more", std::to_string(call.group));
  if (call.rows == 0 || call.columns == 0) return;
  check_pointer(kOp, "y", call.y);
  if (call.depth == 0) return;
  check_pointer(kOp, "x", call.x);
  check_pointer(kOp, "codes", call.codes);
  if (call.values > 0) check_pointer(kOp, "codebook", call.codebook);
}

// Kernels follow the codes unchecked.
void check_codes(const CodebookLinear& call) {
  if (call.values >> call.bits != 0 || call.depth == 0) return;
  uint8_t highest = 0;
  for (int64_t f = 0; f < call.columns; ++f) {
    const uint8_t* codes = call.codes + f * call.codes_stride;
    for (int64_t k = 0; k < call.depth; ++k) highest = std::max(highest, code_at(codes, call.bits, k));
  }
  if (highest < call.values) return;
  refuse(kOp, "codes must be in [0, " + std::to_string(call.values) + "), the values of codebook",
         std::to_string(highest));
}

}  // namespace

void codebook_linear(CodebookLinear call, int threads) {
  check(call);
  if (call.columns > 0 && call.codes != nullptr) check_codes(call);
  if (call.rows == 0 || call.columns == 0) return;
  threads = std::max(1, usable_threads(threads));
  // Columns are shared out; rows too where there are many of them and few columns.
  const auto blocks = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
  const int64_t units = blocks(call.columns, kColumnUnit);
  const int64_t fitting = std::max<int64_t>(1, kGroupBytes / (4 * kColumnUnit * (call.depth + 1)));
  call.block_columns = kColumnUnit * std::min(fitting, std::max<int64_t>(1, units / (2 * threads)));
  const int64_t groups = blocks(call.columns, call.block_columns);
  const int64_t shares = std::min(blocks(threads, groups), 1 + call.rows / kRowsWorthExpanding);
  call.block_rows = blocks(call.rows, shares);

  const int64_t count = groups * blocks(call.rows, call.block_rows);
  const int64_t grain = row_grain((1 + call.block_rows / 16) * call.block_columns * call.depth);
  const int64_t scratch_bytes = call.depth * (4 * (call.block_columns + kCodebookRows) + kCodebookColumns);
  const Kernels& tier = kernels();
  parallel_rows(count, grain, threads, scratch_bytes,
                [&](int64_t begin, int64_t end, void* scratch) { tier.codebook_linear(call, begin, end, scratch); });
}

}  // namespace distilbert_fast
