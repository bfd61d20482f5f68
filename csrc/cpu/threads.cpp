#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>

namespace distilbert_fast {
namespace {

std::atomic<bool> forked{false};

const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

int usable_threads(int threads) { return registered == 0 && forked.load(std::memory_order_relaxed) ? 1 : threads; }

}  // namespace distilbert_fast
