// Enough of CUDA to run a kernel's logic on a CPU: one block at a time, its threads as coroutines. A warp stays
// together at its shuffles and matrix products and runs as far ahead of the others as the barriers of the block let it,
// in an order that changes from barrier to barrier, so that a missing barrier shows. Dynamic shared memory holds NaN
// (codes: −1) before it is written. Threads that wait at different places are an error, as is a launch or an address
// that a GPU would refuse. Speed, memory and rounding are not a GPU's.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static  // blocks run one after the other

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidDevice,
  cudaErrorInvalidConfiguration,
  cudaErrorInvalidValue,
  cudaErrorLaunchFailure,
  cudaErrorMisalignedAddress,
  cudaErrorIllegalAddress,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulated {

constexpr int kDevices = 2, kMultiprocessors = 2;
constexpr unsigned char kPoison = 0xff;
inline int device = 0, launch_device = -1;
inline void* launch_stream = nullptr;
inline cudaError_t last_error = cudaSuccess;
inline int64_t bank_conflicts = 0;

// What a test may set.
inline int capability = 80;
inline unsigned max_blocks = 0xffffffff;  // of x; a real grid holds 2^31 - 1. Few: blocks must take further rows

inline size_t shared_limit() { return (capability >= 90 ? 227 : capability == 80 ? 163 : 99) << 10; }

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int group;
};

struct Product {
  std::function<void()> compute;
  int group;
};

enum class At { kStart, kWarp, kBarrier, kEnd };

struct Thread {
  static constexpr size_t kStack = 64 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  At at;
  unsigned exchanges;            // with the other lanes of its warp, so far
  std::deque<Copy> copies;       // on their way to shared memory, oldest first
  int groups;                    // of copies, committed
  bool unfenced;                 // copies have landed that asynchronous products may not see
  std::deque<Product> products;  // asynchronous ones, oldest first
  int product_groups;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current;  // index of the running thread

inline Thread& me() { return threads[current]; }
inline unsigned lane() { return current % 32; }

// Dynamic shared memory, with a guard behind it.
struct Shared {
  static constexpr size_t kGuard = 1 << 10, kMost = 256 << 10;
  unsigned char* data = static_cast<unsigned char*>(std::aligned_alloc(1024, kMost));
  size_t size = 0;

  void begin_block() { std::memset(data, kPoison, size + kGuard); }
  bool overrun() const {
    return std::any_of(data + size, data + size + kGuard, [](unsigned char x) { return x != kPoison; });
  }
};
inline Shared shared;

[[noreturn]] inline void fail(cudaError_t error) { throw error; }

inline void check_shared(const void* at, size_t alignment) {
  const auto* byte = static_cast<const unsigned char*>(at);
  if (byte < shared.data || byte + alignment > shared.data + shared.size) fail(cudaErrorIllegalAddress);
  if (reinterpret_cast<uintptr_t>(at) % alignment != 0) fail(cudaErrorMisalignedAddress);
}

inline void enter() {
  try {
    body();
  } catch (cudaError_t error) {
    last_error = error;
  }
  me().at = At::kEnd;
}

inline void wait(At at) {
  me().at = at;
  swapcontext(&me().context, &scheduler);
}

// What each lane of the warp passed, by lane. It stays until the exchange after the next.
template <class T>
struct OfWarp {
  const unsigned char* slots;
  T operator[](unsigned lane) const {
    T x;
    std::memcpy(&x, slots + kSlot * lane, sizeof x);
    return x;
  }
  static constexpr size_t kSlot = 32;
};

template <class T>
OfWarp<T> exchange(const T& x) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= OfWarp<T>::kSlot);
  static unsigned char slots[2][1024][OfWarp<T>::kSlot];
  auto& turn = slots[me().exchanges++ % 2];
  std::memcpy(turn[current], &x, sizeof x);
  wait(At::kWarp);
  return {turn[current - lane()]};
}

// The one place where threads [begin, end) all are; kStart if they are apart.
inline At place(size_t begin, size_t end) {
  const auto same = [&](const Thread& thread) { return thread.at == threads[begin].at; };
  return std::all_of(threads.begin() + begin, threads.begin() + end, same) ? threads[begin].at : At::kStart;
}

inline void run_thread(unsigned index) {
  current = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  swapcontext(&scheduler, &threads[index].context);
}

// Every thread runs to its end. False if threads wait for each other at different places.
inline bool run_block(std::mt19937& random) {
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
    thread.at = At::kStart;
    thread.exchanges = thread.groups = thread.product_groups = 0;
    thread.unfenced = false;
    thread.copies.clear();
    thread.products.clear();
  }
  std::vector<unsigned> warps(threads.size() / 32);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (const unsigned warp : warps) {
      do {
        for (unsigned i = 32 * warp; i < 32 * (warp + 1); ++i) run_thread(i);
      } while (place(32 * warp, 32 * (warp + 1)) == At::kWarp);
    }
    const At all = place(0, threads.size());
    if (all != At::kBarrier) return all == At::kEnd;
  }
}

inline std::map<std::pair<int, const void*>, size_t> shared_allowed;  // of a kernel on a device, where raised

inline bool acceptable(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel) {
  const unsigned threads = block.x * block.y * block.z;
  const auto raised = shared_allowed.find({device, kernel});
  const size_t allowed = raised == shared_allowed.end() ? 48 << 10 : raised->second;
  return grid.x && grid.y && grid.z && grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535 && threads > 0 &&
         threads <= 1024 && threads % 32 == 0 && shared_bytes <= allowed;
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_device = device;
  launch_stream = stream;
  if (!acceptable(grid, block, shared_bytes, reinterpret_cast<const void*>(kernel))) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  std::mt19937 random(1);
  body = [&] { kernel(arguments...); };
  threads.resize(block.x * block.y * block.z);
  shared.size = shared_bytes;
  blockDim = block;
  gridDim = dim3(std::min(grid.x, max_blocks), grid.y, grid.z);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x && last_error == cudaSuccess; ++blockIdx.x) {
        shared.begin_block();
        const bool ended = run_block(random);
        if (!ended && last_error == cudaSuccess) last_error = cudaErrorLaunchFailure;
        if (shared.overrun()) last_error = cudaErrorIllegalAddress;
      }
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::At::kBarrier); }
inline void __syncwarp() { emulated::wait(emulated::At::kWarp); }

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulated::exchange(x)[static_cast<unsigned>(lane) % 32];
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int lanes) {
  return emulated::exchange(x)[emulated::lane() ^ static_cast<unsigned>(lanes)];
}

inline uint32_t __ballot_sync(unsigned, int holds) {
  const auto warp = emulated::exchange(holds != 0);
  uint32_t lanes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) lanes |= uint32_t{warp[lane]} << lane;
  return lanes;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulated::kDevices) return cudaErrorInvalidDevice;
  emulated::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= emulated::kDevices) return cudaErrorInvalidDevice;
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulated::capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulated::capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = emulated::kMultiprocessors;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulated::shared_limit()) return cudaErrorInvalidValue;
  emulated::shared_allowed[{emulated::device, reinterpret_cast<const void*>(kernel)}] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated::last_error;
  emulated::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  const char* words[] = {"no error",         "invalid device ordinal", "invalid configuration argument",
                         "invalid argument", "launch failure",         "misaligned address",
                         "illegal address"};
  return words[error];
}

// What a test asks after a call, and sets before it.
#define ASKED extern "C" __attribute__((used, visibility("default"))) inline
ASKED int emulated_device() { return emulated::device; }
ASKED int emulated_launch_device() { return emulated::launch_device; }
ASKED void* emulated_launch_stream() { return emulated::launch_stream; }
ASKED int64_t emulated_bank_conflicts() { return std::exchange(emulated::bank_conflicts, 0); }
ASKED void emulated_set_capability(int capability) { emulated::capability = capability; }
ASKED void emulated_set_max_blocks(unsigned blocks) { emulated::max_blocks = blocks; }
