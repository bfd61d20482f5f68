#include "cpu/buffer.h"

#include <cstddef>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/threads.h"

namespace distilbert_fast {
namespace {

struct Block {
  void* data;
  int64_t capacity;
};

// The blocks that are kept, the newest last.
struct Spares {
  std::vector<Block> blocks;
  int64_t bytes = 0;

  // The newest block for that many bytes, or none; for the caller, who holds the mutex.
  Block take(int64_t wanted) {
    for (size_t i = blocks.size(); i-- > 0;) {
      const Block found = blocks[i];
      if (found.capacity < wanted || found.capacity > wanted + wanted / 4) continue;
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
      bytes -= found.capacity;
      return found;
    }
    return {nullptr, 0};
  }

  void keep(Block block) {
    blocks.push_back(block);
    bytes += block.capacity;
  }

  // Gives the oldest back to the operating system until no more than that many bytes are kept.
  void shrink(int64_t limit) {
    size_t gone = 0;
    for (; bytes > limit; ++gone) {
      std::free(blocks[gone].data);
      bytes -= blocks[gone].capacity;
    }
    blocks.erase(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(gone));
  }
};

Spares& spares() {
  static Spares* kept = new Spares;  // outlives every tensor, also at exit
  return *kept;
}

int64_t rounded_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void* allocate(int64_t capacity, int64_t alignment) {
  void* data = nullptr;
  if (posix_memalign(&data, static_cast<size_t>(alignment), static_cast<size_t>(capacity)) != 0) throw std::bad_alloc();
#ifdef __linux__
  if (alignment >= kHugePage) madvise(data, static_cast<size_t>(capacity), MADV_HUGEPAGE);  // a hint: may be refused
#endif
  return data;
}

Buffer::Buffer(int64_t bytes) : bytes_(bytes) {
  if (bytes < 1) throw std::invalid_argument("Buffer: bytes must be 1 or more, got " + std::to_string(bytes));
  const bool large = bytes >= kLargeBytes;
  if (large) {
    Spares& kept = spares();
    const std::lock_guard<std::mutex> lock(mutex_of(Guarded::buffers));
    const Block found = kept.take(bytes);
    if (found.data) {
      data_ = found.data;
      capacity_ = found.capacity;
      return;
    }
  }
  const int64_t alignment = large ? kHugePage : 64;
  capacity_ = rounded_up(bytes, alignment);
  data_ = allocate(capacity_, alignment);
}

Buffer::~Buffer() {
  if (capacity_ < kLargeBytes || capacity_ > kSpareBytes) {
    std::free(data_);
    return;
  }
  Spares& kept = spares();
  const std::lock_guard<std::mutex> lock(mutex_of(Guarded::buffers));
  kept.keep({data_, capacity_});
  kept.shrink(kSpareBytes);
}

int64_t release_spares() {
  Spares& kept = spares();
  const std::lock_guard<std::mutex> lock(mutex_of(Guarded::buffers));
  const int64_t released = kept.bytes;
  kept.shrink(0);
  return released;
}

}  // namespace distilbert_fast
