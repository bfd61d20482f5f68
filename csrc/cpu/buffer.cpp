#include "buffer.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace distilbert_fast {
namespace {

struct Spare {
  std::mutex mutex;
  void* data = nullptr;
  int64_t capacity = 0;
};

Spare& spare() {
  static Spare* block = new Spare;  // outlives every tensor, also at exit
  return *block;
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
    Spare& kept = spare();
    const std::lock_guard<std::mutex> lock(kept.mutex);
    if (kept.data && kept.capacity >= bytes && kept.capacity <= bytes + bytes / 4) {
      data_ = std::exchange(kept.data, nullptr);
      capacity_ = kept.capacity;
      return;
    }
  }
  const int64_t alignment = large ? kHugePage : 64;
  capacity_ = rounded_up(bytes, alignment);
  data_ = allocate(capacity_, alignment);
}

Buffer::~Buffer() {
  void* unwanted = data_;
  if (capacity_ >= kLargeBytes && capacity_ <= kSpareBytes) {
    Spare& kept = spare();
    const std::lock_guard<std::mutex> lock(kept.mutex);
    unwanted = std::exchange(kept.data, data_);
    kept.capacity = capacity_;
  }
  std::free(unwanted);
}

}  // namespace distilbert_fast
