// Memory for large outputs that come and go every training step.
#pragma once

#include <cstdint>

namespace distilbert_fast {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Memory for std::free, in huge pages if aligned to one: weights and activations that stream through the caches cost a
// third more where each 4 KiB of them is looked up. Throws std::bad_alloc.
void* allocate(int64_t capacity, int64_t alignment);

// A block of memory. When a large one is released, the process keeps it for the next request of about its size, up to
// kSpareBytes in all, the newest blocks: fresh pages from the operating system, zeroed one by one as they are first
// touched, cost more than the kernel that fills them.
class Buffer {
 public:
  // Throws std::invalid_argument for a size below 1, std::bad_alloc where there is no memory.
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_;
  int64_t bytes_;     // asked for
  int64_t capacity_;  // there
};

// Above the first, memory is worth keeping; above the second it is too much to hold on to.
constexpr int64_t kLargeBytes = int64_t{8} << 20;
constexpr int64_t kSpareBytes = int64_t{256} << 20;

// Gives back to the operating system what is kept; how many bytes that were.
int64_t release_spares();

}  // namespace distilbert_fast
