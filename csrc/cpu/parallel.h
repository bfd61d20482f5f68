// Rows shared out over OpenMP threads.
#pragma once

#include <cstdint>

namespace distilbert_fast {

// body(begin, end) over [0, rows) in chunks of `grain` rows. One thread stays outside OpenMP: a process forked after a
// parallel region could not enter another.
template <class Body>
void parallel_rows(int64_t rows, int64_t grain, int threads, const Body& body) {
  if (threads <= 1 || rows <= grain) {
    body(0, rows);
    return;
  }
  const int64_t chunks = (rows + grain - 1) / grain;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = i * grain, end = begin + grain < rows ? begin + grain : rows;
    body(begin, end);
  }
}

}  // namespace distilbert_fast
