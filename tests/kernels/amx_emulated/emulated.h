// What the emulation of AMX tells its tests.
#pragma once

#include <atomic>
#include <cstdint>

namespace emulated {

extern std::atomic<int64_t> threads_with_tiles;  // that have configured tiles and not released them
extern std::atomic<int64_t> multiplications;     // of two tiles, ever
[[noreturn]] void fault(const char* what);

}  // namespace emulated
