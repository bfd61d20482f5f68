// Rows shared out over OpenMP threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/threads.h"

namespace distilbert_fast {

// body(begin, end) over [0, rows) in chunks of `grain` rows. One thread stays outside OpenMP: a process forked after a
// parallel region could not enter another.
template <class Body>
void parallel_rows(int64_t rows, int64_t grain, int threads, const Body& body) {
  threads = usable_threads(threads);
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

// kernel(call, begin, end) likewise.
template <class Call>
void parallel_rows(int64_t rows, int64_t grain, int threads, void (*kernel)(const Call&, int64_t, int64_t),
                   const Call& call) {
  parallel_rows(rows, grain, threads, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// body(begin, end, scratch) likewise, with scratch_bytes of 64 byte aligned memory for each thread.
template <class Body>
void parallel_rows(int64_t rows, int64_t grain, int threads, int64_t scratch_bytes, const Body& body) {
  threads = usable_threads(threads);
  const int64_t chunks = (rows + grain - 1) / grain;
  if (chunks < threads) threads = static_cast<int>(chunks);
  if (threads < 1) threads = 1;
  scratch_bytes = (scratch_bytes + 63) / 64 * 64;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(scratch_bytes * threads + 64)) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, std::free);
  const auto part = [&](int i) { return static_cast<char*>(memory) + i * scratch_bytes; };
  if (threads == 1) {
    body(0, rows, part(0));
    return;
  }
  std::atomic<int> arrived{0};
#pragma omp parallel num_threads(threads)
  {
    void* scratch = part(arrived++);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t begin = i * grain, end = begin + grain < rows ? begin + grain : rows;
      body(begin, end, scratch);
    }
  }
}

}  // namespace distilbert_fast
