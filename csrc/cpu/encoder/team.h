// Threads that work on one thing together, in one OpenMP region from its beginning to its end.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace distilbert_fast {

// All of `size` wait until the last has come. A microsecond apart they spin; a waiter whose core is wanted elsewhere
// gives it up.
class SpinBarrier {
 public:
  void wait(int size) {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 1 << 14) {
#ifdef __x86_64__
        _mm_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

struct Range {
  int64_t begin, end;
};

// One member's view of the team that computes a chunk together; alone it never waits.
struct Team {
  int rank = 0;
  int size = 1;
  SpinBarrier* barrier = nullptr;

  void wait() const {
    if (size > 1) barrier->wait(size);
  }
  // The member's share of [0, n).
  Range share(int64_t n) const { return {n * rank / size, n * (rank + 1) / size}; }
};

// body(rank, size) once on each of up to `threads` threads. One thread stays outside OpenMP, see parallel.h.
template <class Body>
void run_team(int threads, const Body& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
#else
  body(0, 1);
#endif
}

}  // namespace distilbert_fast
