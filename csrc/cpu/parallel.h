// Rows shared out over OpenMP threads; and what a large output wants from the operating system.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Ask for huge pages under a fresh buffer: faulting in 4 KiB pages one by one costs more than filling them.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) & ~(huge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may be refused
#endif
}

}  // namespace distilbert_fast
