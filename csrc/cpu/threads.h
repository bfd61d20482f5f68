// How many threads a call may have, and what of their work a fork must not cut in two.
#pragma once

#include <mutex>

namespace distilbert_fast {

// `threads`, or 1 in a process that was forked: its parent's OpenMP threads do not exist there, and a region would wait
// for them for ever. (A DataLoader's workers ask for one thread anyway.)
int usable_threads(int threads);

// Mutexes that a fork waits for: its child finds them open, and what they guard whole. A thread that holds one may only
// ask for later ones.
enum class Guarded { matches, arenas, buffers };
std::mutex& mutex_of(Guarded what);

}  // namespace distilbert_fast
