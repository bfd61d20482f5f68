#include "cpu/ops/entries.h"

#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

void check(const CosinePair& pair, int64_t rows) {
  check_sizes("cosine_loss", rows, pair.columns);
  check_dtype("cosine_loss", pair.student_dtype);
  check_dtype("cosine_loss", pair.teacher_dtype);
  if (rows == 0 || pair.columns == 0) return;
  check_pointer("cosine_loss", "student", pair.student);
  check_pointer("cosine_loss", "teacher", pair.teacher);
}

}  // namespace

void cosine_loss_forward(const CosineForwardRows& call, int64_t rows, int threads) {
  check(call.pair, rows);
  if (rows == 0) return;
  check_pointer("cosine_loss", "loss", call.loss);
  check_pointer("cosine_loss", "stats", call.stats);
  parallel_rows(rows, row_grain(call.pair.columns), threads, kernels().cosine_loss_forward, call);
}

void cosine_loss_backward(const CosineBackwardRows& call, int64_t rows, int threads) {
  check(call.pair, rows);
  if (rows == 0 || call.pair.columns == 0) return;
  check_pointer("cosine_loss", "dloss", call.dloss);
  check_pointer("cosine_loss", "stats", call.stats);
  check_pointer("cosine_loss", "gradient", call.gradient);
  parallel_rows(rows, row_grain(call.pair.columns), threads, kernels().cosine_loss_backward, call);
}

}  // namespace distilbert_fast
