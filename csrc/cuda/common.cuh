// What all CUDA launchers and kernels share: dtypes, argument and launch checks, the device guard, vectors of a row,
// int8 codes, block reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
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

// A kernel may take `bytes` of dynamic shared memory, more than the 48 KB that need no leave. Asked once a device.
template <auto kernel>
void allow_shared_memory(size_t bytes, int device, const char* op) {
  constexpr int kDevices = 64;
  static std::atomic<bool> allowed[kDevices];
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed)) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), op,
             "cudaFuncSetAttribute");
  if (device < kDevices) allowed[device].store(true, std::memory_order_relaxed);
}

// The codes that ops/ passes for a tensor's dtype.
enum DType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

inline bool is_float(int dtype) { return dtype >= kFloat32 && dtype <= kFloat16; }

// function(x) with x a value of the C++ type of `dtype`, a float's, which its launcher has checked.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // `function` is for the side that calls
#endif
template <class Function>
__host__ __device__ __forceinline__ void with_type(int dtype, const Function& function) {
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

// n neighbours of a row, as wide as a load may be.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Vector {
  T at[n];
};

// Whether all rows of a matrix lie where Vectors may.
inline __host__ __device__ bool aligned(const void* data, int64_t stride_bytes, int bytes = 16) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride_bytes)) % bytes == 0;
}

// x becomes n neighbours of a row, of which `count` are there and the others 0. `whole`: all are, and lie as a Vector.
template <class T, int n>
__device__ __forceinline__ void load_vector(const T* from, int64_t count, bool whole, float (&x)[n]) {
  if (whole) {
    const auto vector = *reinterpret_cast<const Vector<T, n>*>(from);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = to_float(vector.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T, int n>
__device__ __forceinline__ void store_vector(T* to, int64_t count, bool whole, const float (&x)[n]) {
  if (whole) {
    Vector<T, n> vector;
#pragma unroll
    for (int i = 0; i < n; ++i) store(&vector.at[i], x[i]);
    *reinterpret_cast<Vector<T, n>*>(to) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < count) store(to + i, x[i]);
    }
  }
}

// int8 codes, as ops/quantize.py has them: each operation is rounded once, so that the bits are the reference's.
constexpr float kSmallestScale = 0x1p-126f;  // the reciprocal of any scale from here up is finite

// Of a row whose largest magnitude is given.
__device__ __forceinline__ float scale_of(float largest) {
  const float scale = __fdiv_rn(largest, 127.0f);
  return scale < kSmallestScale ? 0.0f : scale;
}

__device__ __forceinline__ float inverse_of(float scale) {
  return scale >= kSmallestScale ? __fdiv_rn(1.0f, scale) : 0.0f;
}

// round(clamp(x r, −127, 127)), and 0 where x r is not a number.
__device__ __forceinline__ int8_t code_of(float x, float r) {
  const float code = __fmul_rn(x, r);
  return static_cast<int8_t>(code == code ? rintf(fminf(fmaxf(code, -127.0f), 127.0f)) : 0.0f);
}

template <int n>
__device__ __forceinline__ void store_codes(int8_t* to, int64_t count, bool whole, const float (&x)[n], float r) {
  Vector<int8_t, n> codes;
#pragma unroll
  for (int i = 0; i < n; ++i) codes.at[i] = code_of(x[i], r);
  if (whole) {
    *reinterpret_cast<Vector<int8_t, n>*>(to) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < count) to[i] = codes.at[i];
    }
  }
}

struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Of two magnitudes, compared as integers: NaN is above infinity.
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return __float_as_uint(a) > __float_as_uint(b) ? a : b;
  }
};

// A value over all lanes of a warp, in each of them. The order is fixed.
template <class Operation>
__device__ __forceinline__ float warp_reduce(float x, Operation operation) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = operation(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Each of n values over all threads of a block of whole warps. The order is fixed, so every thread of every run gets
// the same bits.
template <int n, class Operation>
__device__ void block_reduce(float (&x)[n], Operation operation) {
  constexpr int kWarp = 32, kMaxWarps = 32;
  __shared__ float of_warp[n][kMaxWarps];
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    x[i] = warp_reduce(x[i], operation);
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
