// Enough of CUDA to run a kernel's logic on a CPU: one block at a time, its threads as coroutines. A warp stays
// together at its shuffles and runs as far ahead of the others as the barriers of the block let it, in an order that
// changes from barrier to barrier, so that a missing barrier shows. Threads that wait at different places are an error,
// as is a launch that a GPU would refuse. Speed, memory and rounding are not a GPU's.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct Dimension {
  unsigned x = 0;
};
inline Dimension threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };

namespace emulated {

constexpr int kDevices = 2;
constexpr unsigned kMaxBlocks = 3;  // a real grid holds 2^31 - 1: few, so that blocks must take further rows
inline int device = 0, launch_device = -1;
inline void* launch_stream = nullptr;
inline cudaError_t last_error = cudaSuccess;

enum class At { kStart, kShuffle, kBarrier, kEnd };

struct Thread {
  static constexpr size_t kStack = 64 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  At at = At::kStart;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline float shuffled[1024];

inline void enter() {
  body();
  threads[threadIdx.x].at = At::kEnd;
}

inline void wait(At at) {
  Thread& me = threads[threadIdx.x];
  me.at = at;
  swapcontext(&me.context, &scheduler);
}

// The one place where threads [begin, end) all are; kStart if they are apart.
inline At place(size_t begin, size_t end) {
  const auto same = [&](const Thread& thread) { return thread.at == threads[begin].at; };
  return std::all_of(threads.begin() + begin, threads.begin() + end, same) ? threads[begin].at : At::kStart;
}

// Every thread runs to its end. False if threads wait for each other at different places.
inline bool run_block(std::mt19937& random) {
  for (Thread& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
  }
  std::vector<unsigned> warps(threads.size() / 32);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (const unsigned warp : warps) {
      do {
        for (unsigned i = 32 * warp; i < 32 * (warp + 1); ++i) {
          threadIdx.x = i;
          swapcontext(&scheduler, &threads[i].context);
        }
      } while (place(32 * warp, 32 * (warp + 1)) == At::kShuffle);
    }
    const At all = place(0, threads.size());
    if (all != At::kBarrier) return all == At::kEnd;
  }
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned grid, unsigned block, unsigned, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_device = device;
  launch_stream = stream;
  if (grid == 0 || block == 0 || block > 1024 || block % 32 != 0) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  std::mt19937 random(1);
  body = [&] { kernel(arguments...); };
  threads = std::vector<Thread>(block);
  blockDim.x = block;
  gridDim.x = std::min(grid, kMaxBlocks);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    if (!run_block(random)) last_error = cudaErrorLaunchFailure;
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::At::kBarrier); }

inline float __shfl_xor_sync(unsigned, float x, int lanes) {
  emulated::shuffled[threadIdx.x] = x;
  emulated::wait(emulated::At::kShuffle);
  const float other = emulated::shuffled[threadIdx.x ^ static_cast<unsigned>(lanes)];
  emulated::wait(emulated::At::kShuffle);
  return other;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulated::kDevices) return cudaErrorInvalidDevice;
  emulated::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated::last_error;
  emulated::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  const char* words[] = {"no error", "invalid device ordinal", "invalid configuration argument", "launch failure"};
  return words[error];
}

// What a test asks after a call.
#define ASKED extern "C" __attribute__((used, visibility("default"))) inline
ASKED int emulated_device() { return emulated::device; }
ASKED int emulated_launch_device() { return emulated::launch_device; }
ASKED void* emulated_launch_stream() { return emulated::launch_stream; }
