// What all CUDA launchers and kernels share: dtypes, argument and launch checks, the device guard, block reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace distilbert_fast {

// Host ------------------------------------------------------------------------------------------------------------

inline void require(bool holds, const char* op, const char* expected, const std::string& given) {
  if (!holds) throw std::invalid_argument(std::string(op) + ": " + expected + ", got " + given);
}

inline void check_cuda(cudaError_t status, const char* op, const char* call) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + call + ": " + cudaGetErrorString(status));
  }
}

// Launches go to `device` while this lives; then the caller's device is current again.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&previous_), op, "cudaGetDevice");
    if (device == previous_) return;
    check_cuda(cudaSetDevice(device), op, "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// The codes that ops/ passes for a tensor's dtype.
enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// function(x) with x a value of the C++ type of `dtype`, which its launcher has checked.
template <class Function>
void with_type(int dtype, const Function& function) {
  if (dtype == kFloat32) function(float{});
  if (dtype == kBFloat16) function(__nv_bfloat16{});
  if (dtype == kFloat16) function(__half{});
}

// Device ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void store(float* at, float x) { *at = x; }
__device__ __forceinline__ void store(__nv_bfloat16* at, float x) { *at = __float2bfloat16_rn(x); }
__device__ __forceinline__ void store(__half* at, float x) { *at = __float2half_rn(x); }

struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Each of n values over all threads of a block of whole warps. The order is fixed, so every thread of every run gets
// the same bits.
template <int n, class Operation>
__device__ void block_reduce(float (&x)[n], Operation operation) {
  constexpr int kWarp = 32, kMaxWarps = 32;
  __shared__ float of_warp[n][kMaxWarps];
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      x[i] = operation(x[i], __shfl_xor_sync(0xffffffffu, x[i], offset));
    }
    if (threadIdx.x % kWarp == 0) of_warp[i][warp] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    x[i] = of_warp[i][0];
    for (int w = 1; w < warps; ++w) x[i] = operation(x[i], of_warp[i][w]);
  }
  __syncthreads();  // of_warp is free for the next reduction
}

}  // namespace distilbert_fast
