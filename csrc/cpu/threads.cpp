#include "cpu/threads.h"

#include <pthread.h>

#include <array>
#include <atomic>

namespace distilbert_fast {
namespace {

std::atomic<bool> forked{false};

using Mutexes = std::array<std::mutex, 3>;
Mutexes& mutexes() {
  static Mutexes& all = *new Mutexes;  // never destroyed: others may be, after this module
  return all;
}
void lock_all() {
  for (std::mutex& mutex : mutexes()) mutex.lock();
}
void unlock_all() {
  for (std::mutex& mutex : mutexes()) mutex.unlock();
}

const int registered = pthread_atfork(lock_all, unlock_all, [] {
  forked.store(true);
  unlock_all();
});

}  // namespace

int usable_threads(int threads) { return registered == 0 && forked.load(std::memory_order_relaxed) ? 1 : threads; }

std::mutex& mutex_of(Guarded what) { return mutexes()[static_cast<std::size_t>(what)]; }

}  // namespace distilbert_fast
