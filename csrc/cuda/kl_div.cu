// kl_div on one row:   loss = τ² Σ p_t (log p_t − log p_s),   d loss/d s = τ (p_s − p_t),   p = softmax(logits/τ).
//
// With k = log2(e)/τ, d = x − max x and e = 2^(k d):   Z = Σ e,   p = e / Z,   W = Σ e_t (d_t − d_s), so
//   loss = τ/k (k W / Z_t + log2 Z_s − log2 Z_t).
// W is added in units of 2^20, so that vocabularies masked with the lowest float on either side stay finite.
//
// One block takes one row. Pass 1: every thread runs through its columns, kAtOnce loads in flight, with maxima and
// sums of its own that grow together; then the block joins them. Pass 2, if the gradient is wanted, goes through the
// row again from its end, which the L2 cache holds still. Neighbouring threads read neighbouring elements one by one:
// a row of 30522 starts on no 16-byte boundary, and student and teacher may each start on another.
#include "entries.h"

#include <cfloat>
#include <cmath>

#include "common.cuh"

namespace distilbert_fast {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kAtOnce = 8;
constexpr double kLog2e = 1.4426950408889634;
constexpr float kUnit = 1 << 20;  // of W

// What a row, or a thread's part of it, is reduced to. Of nothing: no sums, and maxima below every logit.
struct RowSums {
  float m_s = -FLT_MAX, m_t = -FLT_MAX;
  float z_s = 0, z_t = 0, w = 0;

  // The same sums under higher maxima: every d falls by f, so W turns into 2^(k f_t) (W + Z_t (f_t − f_s)).
  __device__ __forceinline__ void raise(float to_s, float to_t, float k) {
    const float f_s = fmaxf(m_s - to_s, -FLT_MAX);  // finite, as 0 · f must be 0 while there are no sums
    const float f_t = fmaxf(m_t - to_t, -FLT_MAX);
    const float factor = exp2f(f_t * k);
    w = factor * fmaf(z_t, (f_t - f_s) * (1 / kUnit), w);
    z_t *= factor;
    z_s *= exp2f(f_s * k);
    m_s = to_s;
    m_t = to_t;
  }

  // n columns that lie `step` elements apart.
  template <int n, class S, class T>
  __device__ __forceinline__ void add(const S* s, const T* t, int64_t step, float k) {
    float x_s[n], x_t[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x_s[i] = to_float(s[i * step]);
      x_t[i] = to_float(t[i * step]);
    }
    float max_s = m_s, max_t = m_t;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      max_s = fmaxf(max_s, x_s[i]);
      max_t = fmaxf(max_t, x_t[i]);
    }
    raise(max_s, max_t, k);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float d_s = x_s[i] - m_s, d_t = x_t[i] - m_t;
      const float e_t = exp2f(d_t * k);
      z_s += exp2f(d_s * k);
      z_t += e_t;
      w = fmaf(e_t * (1 / kUnit), d_t - d_s, w);
    }
  }

  // The threads' sums become the block's, in every thread.
  __device__ __forceinline__ void join(float k) {
    float m[2] = {m_s, m_t};
    block_reduce(m, Maximum());
    raise(m[0], m[1], k);
    float sums[3] = {z_s, z_t, w};
    block_reduce(sums, Sum());
    z_s = sums[0];
    z_t = sums[1];
    w = sums[2];
  }
};

template <class S, class T>
__device__ __forceinline__ RowSums sums(const S* s, const T* t, int64_t columns, float k) {
  const int64_t step = blockDim.x;
  RowSums row;
  int64_t i = threadIdx.x;
  for (; i + (kAtOnce - 1) * step < columns; i += kAtOnce * step) row.add<kAtOnce>(s + i, t + i, step, k);
  for (; i < columns; i += step) row.add<1>(s + i, t + i, step, k);
  row.join(k);
  return row;
}

// gradient = scale (p_s − p_t)
template <class S, class T>
struct GradientRow {
  const S* s;
  const T* t;
  float k, scale, m_s, z_s, m_t, z_t;

  __device__ __forceinline__ void write(S* out, int64_t columns) const {
    const float a = scale / z_s, b = scale / z_t;
    const int64_t step = blockDim.x;
    for (int64_t from_end = threadIdx.x; from_end < columns; from_end += step) {
      const int64_t i = columns - 1 - from_end;
      const float e_s = exp2f((to_float(s[i]) - m_s) * k);
      const float e_t = exp2f((to_float(t[i]) - m_t) * k);
      store(out + i, fmaf(a, e_s, -b * e_t));
    }
  }
};

template <class S>
__device__ __forceinline__ void write_zeros(S* out, int64_t columns) {
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) store(out + i, 0.0f);
}

__device__ __forceinline__ void write_stats(float* stats, float m_s, float z_s, float m_t, float z_t) {
  stats[0] = m_s;
  stats[1] = z_s;
  stats[2] = m_t;
  stats[3] = z_t;
}

template <class S, class T>
__global__ void __launch_bounds__(kMaxThreads, 2) forward_kernel(const KlDivForward call) {
  const KlDivLogits& logits = call.logits;
  const int64_t columns = logits.columns;
  const float k = static_cast<float>(kLog2e / logits.temperature);
  for (int64_t r = blockIdx.x; r < logits.rows; r += gridDim.x) {
    S* gradient = call.gradient ? static_cast<S*>(call.gradient) + r * columns : nullptr;
    if (logits.mask && !logits.mask[r]) {
      if (threadIdx.x == 0) {
        call.loss[r] = 0;
        if (call.stats) write_stats(call.stats + 4 * r, 0, 1, 0, 1);
      }
      if (gradient) write_zeros(gradient, columns);
      continue;
    }
    const S* s = static_cast<const S*>(logits.student) + r * logits.student_stride;
    const T* t = static_cast<const T*>(logits.teacher) + r * logits.teacher_stride;
    const RowSums row = sums(s, t, columns, k);
    if (threadIdx.x == 0) {
      const double bits = double{k} * kUnit * row.w / row.z_t + log2(double{row.z_s}) - log2(double{row.z_t});
      call.loss[r] = static_cast<float>(logits.temperature / k * bits);  // the rounded k, so that its rounding cancels
      if (call.stats) write_stats(call.stats + 4 * r, row.m_s, row.z_s, row.m_t, row.z_t);
    }
    if (gradient) {
      const float scale = *call.scale * static_cast<float>(logits.temperature);
      GradientRow<S, T>{s, t, k, scale, row.m_s, row.z_s, row.m_t, row.z_t}.write(gradient, columns);
    }
  }
}

template <class S, class T>
__global__ void __launch_bounds__(kMaxThreads, 2) backward_kernel(const KlDivBackward call) {
  const KlDivLogits& logits = call.logits;
  const int64_t columns = logits.columns;
  const float k = static_cast<float>(kLog2e / logits.temperature);
  for (int64_t r = blockIdx.x; r < logits.rows; r += gridDim.x) {
    S* gradient = static_cast<S*>(call.gradient) + r * columns;
    if (logits.mask && !logits.mask[r]) {
      write_zeros(gradient, columns);
      continue;
    }
    const float* stats = call.stats + 4 * r;
    const float scale = call.dloss[r] * static_cast<float>(logits.temperature);
    const S* s = static_cast<const S*>(logits.student) + r * logits.student_stride;
    const T* t = static_cast<const T*>(logits.teacher) + r * logits.teacher_stride;
    GradientRow<S, T>{s, t, k, scale, stats[0], stats[1], stats[2], stats[3]}.write(gradient, columns);
  }
}

constexpr char kOp[] = "kl_div";

void check(const KlDivLogits& logits) {
  const auto text = [](auto x) { return std::to_string(x); };
  require(logits.rows >= 0, kOp, "rows must be 0 or more", text(logits.rows));
  require(logits.columns >= 1 || logits.rows == 0, kOp, "columns must be 1 or more", text(logits.columns));
  require(logits.student_stride >= 0, kOp, "student_stride must be 0 or more", text(logits.student_stride));
  require(logits.teacher_stride >= 0, kOp, "teacher_stride must be 0 or more", text(logits.teacher_stride));
  require(is_float(logits.student_dtype), kOp, "student_dtype must be 0, 1 or 2", text(logits.student_dtype));
  require(is_float(logits.teacher_dtype), kOp, "teacher_dtype must be 0, 1 or 2", text(logits.teacher_dtype));
  require(std::isfinite(logits.temperature) && logits.temperature > 0, kOp, "temperature must be finite and above 0",
          text(logits.temperature));
  require(logits.student || logits.rows == 0, kOp, "student must point to logits", "null");
  require(logits.teacher || logits.rows == 0, kOp, "teacher must point to logits", "null");
}

// A block for every row, up to what a grid may hold; then blocks take further rows.
unsigned blocks(int64_t rows) { return static_cast<unsigned>(rows < INT32_MAX ? rows : INT32_MAX); }

// Whole warps, no more than the columns can keep busy.
unsigned threads(int64_t columns) {
  const int64_t warps = (columns + 32 * kAtOnce - 1) / (32 * kAtOnce);
  return static_cast<unsigned>(warps < kMaxThreads / 32 ? 32 * warps : kMaxThreads);
}

}  // namespace

void kl_div_forward(const KlDivForward& call, int device, void* stream) {
  const KlDivLogits& logits = call.logits;
  check(logits);
  if (logits.rows == 0) return;
  require(call.loss, kOp, "loss must point to memory", "null");
  require(call.scale || !call.gradient, kOp, "scale must point to a number where a gradient is wanted", "null");
  const DeviceGuard guard(device, kOp);
  with_type(logits.student_dtype, [&](auto s) {
    with_type(logits.teacher_dtype, [&](auto t) {
      forward_kernel<decltype(s), decltype(t)>
          <<<blocks(logits.rows), threads(logits.columns), 0, static_cast<cudaStream_t>(stream)>>>(call);
    });
  });
  check_cuda(cudaGetLastError(), kOp, "launch of the forward kernel");
}

void kl_div_backward(const KlDivBackward& call, int device, void* stream) {
  const KlDivLogits& logits = call.logits;
  check(logits);
  if (logits.rows == 0) return;
  require(call.dloss, kOp, "dloss must point to memory", "null");
  require(call.stats, kOp, "stats must point to memory", "null");
  require(call.gradient, kOp, "gradient must point to memory", "null");
  const DeviceGuard guard(device, kOp);
  with_type(logits.student_dtype, [&](auto s) {
    with_type(logits.teacher_dtype, [&](auto t) {
      backward_kernel<decltype(s), decltype(t)>
          <<<blocks(logits.rows), threads(logits.columns), 0, static_cast<cudaStream_t>(stream)>>>(call);
    });
  });
  check_cuda(cudaGetLastError(), kOp, "launch of the backward kernel");
}

}  // namespace distilbert_fast
