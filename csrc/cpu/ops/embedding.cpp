#include "cpu/ops/entries.h"

#include <algorithm>

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/ops/row_sums.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

constexpr const char* kTables[] = {"word", "position", "token_type"};
constexpr const char* kIds[] = {"input_ids", "position_ids", "token_type_ids"};

template <class Id>
void check_ids(const char* op, int which, const Id* ids, int64_t rows, int64_t table_rows) {
  Id low = ids[0], high = ids[0];
  for (int64_t r = 1; r < rows; ++r) {
    low = std::min(low, ids[r]);
    high = std::max(high, ids[r]);
  }
  if (low >= 0 && high < table_rows) return;
  refuse(
      op,
      std::string(kIds[which]) + " must be in [0, " + std::to_string(table_rows) + "), the rows of " + kTables[which],
      std::to_string(low < 0 ? low : high));
}

void check_lookups(const char* op, const Lookup (&lookups)[3], int64_t rows, int64_t columns) {
  for (int k = 0; k < 3; ++k) {
    const Lookup& lookup = lookups[k];
    check_dtype(op, lookup.dtype);
    if (k == 2 && !lookup.ids) continue;
    check_pointer(op, kIds[k], lookup.ids);
    if (lookup.wide) {
      check_ids(op, k, static_cast<const int64_t*>(lookup.ids), rows, lookup.table_rows);
    } else {
      check_ids(op, k, static_cast<const int32_t*>(lookup.ids), rows, lookup.table_rows);
    }
    if (columns > 0) check_pointer(op, kTables[k], lookup.table);
  }
}

}  // namespace

void embedding_forward(const EmbeddingRows& call, int64_t rows, int threads) {
  const bool coded = call.out.codes.data || call.out.codes.scale_out;
  const char* op = coded ? "embedding_quantize" : "embedding";
  check_sizes(op, rows, call.out.columns);
  check_dtype(op, call.out.y_dtype);
  check_positive(op, "eps", call.out.eps);
  if (rows == 0) return;
  check_lookups(op, call.lookups, rows, call.out.columns);
  if (call.out.columns > 0) {
    check_pointer(op, "weight", call.out.weight);
    check_pointer(op, "bias", call.out.bias);
  }
  parallel_rows(rows, row_grain(call.out.columns), threads, kernels().embedding_forward, call);
}

void embedding_backward(const EmbeddingGradientRows& call, int64_t rows, float* dweight, float* dbias, int threads) {
  check_gradient("embedding", call.gradient, rows, dweight, dbias);
  if (rows > 0) check_lookups("embedding", call.lookups, rows, call.gradient.columns);
  with_row_sums(call, rows, dweight, dbias, threads, kernels().embedding_backward);
}

}  // namespace distilbert_fast
