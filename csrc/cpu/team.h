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

struct Range {
  int64_t begin, end;
};

// Work of no step, in parts of less than a microsecond, which members do while they wait for each other.
class SideWork {
 public:
  virtual ~SideWork() = default;
  // Goes on with it; false once nothing is left for this member.
  virtual bool step(int rank) = 0;
  // The last steps begin: what the caller is going to read next may come into its core's caches.
  virtual void near_end() {}
  // Does what is left, with the other members.
  void finish(int rank) {
    while (step(rank)) continue;
  }
};

// All of `size` wait until the last has come. A microsecond apart they spin; a waiter whose core is wanted elsewhere
// gives it up. Until they meet they take parts of the work of a step.
class SpinBarrier {
 public:
  // The next part of [0, n), an empty one once all is taken: half of what each would have of the rest, so that a core
  // which others want too comes back for less.
  Range take(int64_t n, int size) {
    int64_t begin = taken_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t left = n - begin, part = (left + 2 * size - 1) / (2 * size);
      if (left <= 0) return {n, n};
      if (taken_.compare_exchange_weak(begin, begin + part, std::memory_order_relaxed)) return {begin, begin + part};
    }
  }
  void wait(int size, int rank, SideWork* aside) {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      taken_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    if (aside != nullptr) aside->step(rank);
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
  std::atomic<int64_t> taken_{0};
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

// One member's view of the team that computes a chunk together; alone it never waits.
struct Team {
  int rank = 0;
  int size = 1;
  SpinBarrier* barrier = nullptr;
  SideWork* aside = nullptr;  // may be null

  // body(part, next) until all members together have done [0, n); then they wait for each other. `next` is the part
  // that this member does after it, empty after its last: there is time to fetch what it reads.
  template <class Body>
  void divide_ahead(int64_t n, const Body& body) const {
    if (size == 1) return body(Range{0, n}, Range{n, n});
    for (Range part = barrier->take(n, size), next; part.begin < part.end; part = next) {
      next = barrier->take(n, size);
      body(part, next);
    }
    barrier->wait(size, rank, aside);
  }
  template <class Body>
  void divide(int64_t n, const Body& body) const {
    divide_ahead(n, [&](Range part, Range) { body(part.begin, part.end); });
  }
  void wait() const {
    if (size > 1) barrier->wait(size, rank, aside);
  }
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
