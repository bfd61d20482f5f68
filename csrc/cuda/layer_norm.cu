// layer_norm on one row:   h = x + residual,   y = (h − μ) rstd w + b,   rstd = 1 / √(mean (h − μ)² + ε);
// and, if wanted, the int8 codes of y before it is rounded, as ops/quantize.py has them.
//
// The mean m of h is rounded, and the mean of d = h − m is what it lacks: μ = m + mean d and the variance
// mean d² − (mean d)² keep their digits under any offset.
//
// A warp takes a row of up to 1024 columns: x and residual are read once, 16 bytes at a time, and stay in registers
// while sums, y, its largest magnitude and its codes are made. A longer row has a block, which reads it again, from the
// caches, for each of those.
#include "entries.h"

#include <cmath>

#include "common.cuh"

namespace distilbert_fast {
namespace {

constexpr int kWarpsPerBlock = 4;  // of rows that a warp takes
constexpr int kMaxKept = 1024;     // columns of such a row
constexpr int kBlockThreads = 512;

// One row in the types of a call; n neighbours at a time.
template <class T, class P, int n>
struct Row {
  const LayerNorm& call;
  const int64_t row;

  __device__ __forceinline__ bool whole(int64_t column, const void* data, int64_t stride_bytes, int bytes = 16) const {
    return column + n <= call.columns && aligned(data, stride_bytes, bytes);
  }

  __device__ __forceinline__ void load_sum(int64_t column, float (&h)[n]) const {
    const int64_t count = call.columns - column, size = sizeof(T);
    const T* const x = static_cast<const T*>(call.x);
    load_vector(x + row * call.x_stride + column, count, whole(column, x, call.x_stride * size), h);
    if (!call.residual) return;
    float more[n];
    const T* const residual = static_cast<const T*>(call.residual);
    load_vector(residual + row * call.residual_stride + column, count,
                whole(column, residual, call.residual_stride * size), more);
#pragma unroll
    for (int i = 0; i < n; ++i) h[i] += more[i];
  }

  // h becomes y, where h − m − shift is h − μ.
  __device__ __forceinline__ void normalize(int64_t column, float m, float shift, float rstd, float (&h)[n]) const {
    float w[n], b[n];
    const int64_t count = call.columns - column;
    load_vector(static_cast<const P*>(call.weight) + column, count, whole(column, call.weight, 0), w);
    load_vector(static_cast<const P*>(call.bias) + column, count, whole(column, call.bias, 0), b);
#pragma unroll
    for (int i = 0; i < n; ++i) h[i] = (h[i] - m - shift) * rstd * w[i] + b[i];
  }

  __device__ __forceinline__ void store_y(int64_t column, const float (&y)[n]) const {
    T* const out = static_cast<T*>(call.y);
    store_vector(out + row * call.columns + column, call.columns - column,
                 whole(column, out, call.columns * static_cast<int64_t>(sizeof(T))), y);
  }

  __device__ __forceinline__ void store_codes(int64_t column, const float (&y)[n], float r) const {
    distilbert_fast::store_codes(call.codes + row * call.columns + column, call.columns - column,
                                 whole(column, call.codes, call.columns, n), y, r);
  }
};

// kKept vectors of a row for each lane of its warp; or none, and a block for each row.
template <class T, class P, int kKept>
__global__ void __launch_bounds__(kKept ? 32 * kWarpsPerBlock : kBlockThreads, kKept ? 3 : 2)
    layer_norm_kernel(const __grid_constant__ LayerNorm call) {
  constexpr int n = 16 / sizeof(T);
  const int thread = kKept ? threadIdx.x % 32 : threadIdx.x, threads = kKept ? 32 : kBlockThreads;
  const int64_t at_once = static_cast<int64_t>(gridDim.x) * (kKept ? kWarpsPerBlock : 1);
  const auto reduce = [](float x, auto operation) {
    if constexpr (kKept) return warp_reduce(x, operation);
    float of_block[1] = {x};
    block_reduce(of_block, operation);
    return of_block[0];
  };

  int64_t r = kKept ? static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32 : blockIdx.x;
  for (; r < call.rows; r += at_once) {
    const Row<T, P, n> row{call, r};
    float kept[kKept ? kKept : 1][n];
    // use(column, h) for all of the thread's columns, n at a time. What it changes of h stays if the row is kept.
    const auto for_each = [&](auto use) {
      if constexpr (kKept) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) use(static_cast<int64_t>(i * 32 + thread) * n, kept[i]);
      } else {
        for (int64_t column = thread * n; column < call.columns; column += threads * n) {
          row.load_sum(column, kept[0]);
          use(column, kept[0]);
        }
      }
    };

    if constexpr (kKept) for_each([&](int64_t column, float (&h)[n]) { row.load_sum(column, h); });
    float sum = 0;
    for_each([&](int64_t, float (&h)[n]) {
#pragma unroll
      for (int i = 0; i < n; ++i) sum += h[i];
    });
    const float columns = static_cast<float>(call.columns), m = reduce(sum, Sum()) / columns;

    float d_sum = 0, d_squares = 0;
    for_each([&](int64_t column, float (&h)[n]) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const float d = column + i < call.columns ? h[i] - m : 0.0f;
        d_sum += d;
        d_squares += d * d;
      }
    });
    const float shift = reduce(d_sum, Sum()) / columns;
    const float variance = reduce(d_squares, Sum()) / columns - shift * shift;
    const float rstd = 1.0f / sqrtf((variance < 0 ? 0 : variance) + static_cast<float>(call.eps));
    if (thread == 0 && call.mean) call.mean[r] = m + shift;
    if (thread == 0 && call.rstd) call.rstd[r] = rstd;

    float largest = 0;
    for_each([&](int64_t column, float (&h)[n]) {
      row.normalize(column, m, shift, rstd, h);
      row.store_y(column, h);
#pragma unroll
      for (int i = 0; i < n; ++i) largest = column + i < call.columns ? Larger()(largest, fabsf(h[i])) : largest;
    });
    if (!call.codes && !call.scale_out) continue;

    const float scale = call.scale_out ? scale_of(reduce(largest, Larger())) : call.scale_in[r * call.scale_in_stride];
    if (thread == 0 && call.scale_out) call.scale_out[r] = scale;
    for_each([&](int64_t column, float (&h)[n]) {
      if constexpr (!kKept) row.normalize(column, m, shift, rstd, h);
      row.store_codes(column, h, inverse_of(scale));
    });
  }
}

constexpr char kOp[] = "layer_norm";

void check(const LayerNorm& call) {
  const auto text = [](auto x) { return std::to_string(x); };
  require(call.rows >= 0, kOp, "rows must be 0 or more", text(call.rows));
  require(call.columns >= 0, kOp, "columns must be 0 or more", text(call.columns));
  require(call.x_stride >= 0, kOp, "x_stride must be 0 or more", text(call.x_stride));
  require(call.residual_stride >= 0, kOp, "residual_stride must be 0 or more", text(call.residual_stride));
  require(is_float(call.dtype), kOp, "dtype must be 0, 1 or 2", text(call.dtype));
  require(call.parameter_dtype == kFloat32 || call.parameter_dtype == call.dtype, kOp,
          "parameter_dtype must be 0 or that of x", text(call.parameter_dtype));
  require(std::isfinite(call.eps) && call.eps > 0, kOp, "eps must be finite and above 0", text(call.eps));
  require(call.scale_in_stride == 0 || call.scale_in_stride == 1, kOp, "scale_in_stride must be 0 or 1",
          text(call.scale_in_stride));
  if (call.rows == 0 || call.columns == 0) return;
  require(call.codes || !(call.scale_in || call.scale_out), kOp, "codes must point to memory where there is a scale",
          "null");
  require(!call.codes || !call.scale_out != !call.scale_in, kOp, "codes must come with scale_in or scale_out",
          call.scale_in ? "both" : "neither");
  require(call.x, kOp, "x must point to numbers", "null");
  require(call.weight, kOp, "weight must point to numbers", "null");
  require(call.bias, kOp, "bias must point to numbers", "null");
  require(call.y, kOp, "y must point to memory", "null");
}

template <class T, class P>
void launch(const LayerNorm& call, cudaStream_t stream) {
  const auto blocks = [](int64_t n) { return static_cast<unsigned>(n < INT32_MAX ? n : INT32_MAX); };
  if (call.columns <= kMaxKept) {
    constexpr int kKept = kMaxKept * sizeof(T) / 16 / 32;
    const int64_t groups = (call.rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
    layer_norm_kernel<T, P, kKept><<<blocks(groups), 32 * kWarpsPerBlock, 0, stream>>>(call);
  } else {
    layer_norm_kernel<T, P, 0><<<blocks(call.rows), kBlockThreads, 0, stream>>>(call);
  }
}

}  // namespace

void layer_norm(const LayerNorm& call, int device, void* stream) {
  check(call);
  if (call.rows == 0) return;
  const DeviceGuard guard(device, kOp);
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    if (call.parameter_dtype == kFloat32) {
      launch<T, float>(call, static_cast<cudaStream_t>(stream));
    } else {
      launch<T, T>(call, static_cast<cudaStream_t>(stream));
    }
  });
  check_cuda(cudaGetLastError(), kOp, "launch of the kernel");
}

}  // namespace distilbert_fast
