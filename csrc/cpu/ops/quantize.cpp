#include "cpu/ops/entries.h"

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {

void quantize(const QuantizeRows& call, int64_t rows, int threads) {
  check_sizes("quantize", rows, call.columns);
  check_dtype("quantize", call.x_dtype);
  if (rows == 0) return;
  if (call.columns > 0) {
    check_pointer("quantize", "x", call.x);
    check_pointer("quantize", "codes", call.codes.data);
  }
  parallel_rows(rows, row_grain(call.columns), threads, kernels().quantize, call);
}

}  // namespace distilbert_fast
