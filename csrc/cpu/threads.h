// How many threads a call may have.
#pragma once

namespace distilbert_fast {

// `threads`, or 1 in a process that was forked: its parent's OpenMP threads do not exist there, and a region would wait
// for them for ever. (A DataLoader's workers ask for one thread anyway.)
int usable_threads(int threads);

}  // namespace distilbert_fast
