// Sums over rows that do not depend on the number of threads: made in chunks of kRowsOfSum rows, added in chunk order.
#pragma once

#include <vector>

#include "cpu/check.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"

namespace distilbert_fast {

// Runs body(begin, end) over whole chunks of rows, each of which adds to its own [2, columns] of call.sums; then
// dweight and dbias [columns] are the sums of those.
template <class Call, class Body>
void with_row_sums(Call call, int64_t rows, float* dweight, float* dbias, int threads, const Body& body) {
  const int64_t columns = call.gradient.columns, chunks = (rows + kRowsOfSum - 1) / kRowsOfSum;
  std::vector<float> sums(static_cast<size_t>(chunks * 2 * columns));
  call.gradient.sums = sums.data();
  parallel_rows(chunks, row_grain(kRowsOfSum * columns), threads, [&](int64_t begin, int64_t end) {
    body(call, begin * kRowsOfSum, end * kRowsOfSum < rows ? end * kRowsOfSum : rows);
  });
  std::vector<double> totals(static_cast<size_t>(2 * columns));
  for (int64_t i = 0; i < chunks * 2 * columns; i += 2 * columns) {
    for (int64_t c = 0; c < 2 * columns; ++c) totals[c] += sums[i + c];
  }
  for (int64_t c = 0; c < columns; ++c) {
    dweight[c] = static_cast<float>(totals[c]);
    dbias[c] = static_cast<float>(totals[columns + c]);
  }
}

inline void check_gradient(const char* op, const NormalizedGradient& call, int64_t rows, const float* dweight,
                           const float* dbias) {
  check_sizes(op, rows, call.columns);
  check_dtype(op, call.dy_dtype);
  check_dtype(op, call.dh_dtype);
  if (call.columns == 0) return;
  check_pointer(op, "dweight", dweight);
  check_pointer(op, "dbias", dbias);
  if (rows == 0) return;
  check_pointer(op, "dy", call.dy);
  check_pointer(op, "weight", call.weight);
  check_pointer(op, "mean", call.mean);
  check_pointer(op, "rstd", call.rstd);
  check_pointer(op, "dh", call.dh);
}

}  // namespace distilbert_fast
