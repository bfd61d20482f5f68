#include "cpu/ops/entries.h"

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {

void fit_scale(const FitScaleRows& call, int64_t rows, int threads) {
  check_sizes("fit_scale", rows, call.columns);
  check_dtype("fit_scale", call.w_dtype);
  if (rows == 0) return;
  if (call.columns > 0) check_pointer("fit_scale", "w", call.w);
  check_pointer("fit_scale", "scale", call.scale);
  parallel_rows(rows, 1, threads, kernels().fit_scale, call);
}

}  // namespace distilbert_fast
