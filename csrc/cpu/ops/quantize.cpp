#include "cpu/ops/quantize.h"

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
  const Kernels& tier = kernels();
  parallel_rows(rows, row_grain(call.columns), threads,
                [&](int64_t begin, int64_t end) { tier.quantize(call, begin, end); });
}

}  // namespace distilbert_fast
