// What the int8_linear kernels share: tiles of codes on their way into shared memory, accumulators on their way out.
#pragma once

#include "common.cuh"
#include "int8_linear.h"
#include "mma.cuh"

namespace distilbert_fast {

// Where 16-byte chunk `chunk` of row `row` lies in a tile of kDepth bytes a row. Chunks trade places within 128 bytes,
// so that the same chunk of 8 neighbouring rows lies in 8 different groups of banks. (128: wgmma's own swizzle.)
template <int kDepth>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(kDepth == 64 || kDepth == 128);
  return row * kDepth + 16 * (kDepth == 128 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3));
}

// Copies kRows rows of a matrix of codes, kDepth columns at a time; zeros stand for what lies outside of it. Each
// thread copies one chunk of every kRowsAtOnce-th row: asynchronously, or byte by byte where rows are not aligned.
template <int kRows, int kDepth, int kThreads>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const int8_t* codes, int64_t stride, int64_t rows, int64_t depth,
                                        int64_t first_row)
      : codes_(codes),
        stride_(stride),
        depth_(depth),
        rows_(static_cast<int>(rows - first_row < kRows ? rows - first_row : kRows)),
        aligned_(aligned(codes, stride)) {
    from_ = codes + (first_row + first()) * stride + 16 * chunk();
  }

  // Columns [k, k + kDepth). The copies belong to the thread's next cp_async group.
  __device__ __forceinline__ void load(unsigned char* tile, int64_t k) const {
    const int64_t left = depth_ - k - 16 * chunk();
    const int bytes = left <= 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int row = first() + i * kRowsAtOnce, wanted = row < rows_ ? bytes : 0;
        const int8_t* from = wanted ? from_ + i * kRowsAtOnce * stride_ + k : codes_;
        cp_async_bytes(tile + chunk_offset<kDepth>(row, chunk()), from, wanted);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int row = first() + i * kRowsAtOnce, wanted = row < rows_ ? bytes : 0;
        const int8_t* from = from_ + i * kRowsAtOnce * stride_ + k;
        Vector<int8_t, 16> codes;
#pragma unroll
        for (int j = 0; j < 16; ++j) codes.at[j] = j < wanted ? from[j] : 0;
        *reinterpret_cast<Vector<int8_t, 16>*>(tile + chunk_offset<kDepth>(row, chunk())) = codes;
      }
    }
  }

 private:
  static constexpr int kChunks = kDepth / 16, kRowsAtOnce = kThreads / kChunks;
  static_assert(kRows % kRowsAtOnce == 0);

  static __device__ __forceinline__ int first() { return threadIdx.x / kChunks; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kChunks; }

  const int8_t* codes_;
  const int8_t* from_;  // the thread's chunk of its first row
  int64_t stride_;
  int64_t depth_;
  int rows_;
  bool aligned_;
};

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// Accumulators leave through shared memory, kRows rows at a time, so that each thread finishes 8 neighbours of a row
// and reads and writes device memory 16 bytes at a time. Its columns, and so their scales and bias, stay the same.
template <int kColumns, int kThreads>
class Epilogue {
 public:
  static constexpr int kRows = 64;
  static constexpr int kPitch = kColumns + 8;  // 4 rows of a fragment fall into different banks
  static constexpr size_t kBytes = sizeof(int32_t) * kRows * kPitch;

  __device__ __forceinline__ Epilogue(const Int8Linear& call, int64_t first_column)
      : call_(call), column_(first_column + kWidth * (threadIdx.x % kGroups)), count_(call.columns - column_) {
    load_vector(call.w_scale + column_, count_, whole(call.w_scale, 0), w_scale_);
    if (call.bias) {
      with_type(call.bias_dtype, [&](auto type) {
        const auto* bias = static_cast<const decltype(type)*>(call.bias);
        load_vector(bias + column_, count_, whole(bias, 0), bias_);
      });
    }
  }

  // A fragment's neighbours in a row, into the staged tile.
  static __device__ __forceinline__ void stage(int32_t* staged, int row, int column, int32_t first, int32_t second) {
    *reinterpret_cast<Vector<int32_t, 2>*>(staged + row * kPitch + column) = {first, second};
  }

  // The staged rows, of which the first is `first_row`, are finished and written.
  __device__ __forceinline__ void write(const int32_t* staged, int64_t first_row) const {
    if (count_ <= 0) return;
#pragma unroll 1
    for (int r = threadIdx.x / kGroups; r < kRows && first_row + r < call_.rows; r += kThreads / kGroups) {
      const auto acc =
          *reinterpret_cast<const Vector<int32_t, kWidth>*>(staged + r * kPitch + kWidth * (threadIdx.x % kGroups));
      const int64_t row = first_row + r;
      const float x_scale = call_.x_scale[row * call_.x_scale_stride];
      float y[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] = static_cast<float>(acc.at[i]) * x_scale * w_scale_[i] + bias_[i];
      if (call_.gelu) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) y[i] = gelu(y[i]);
      }
      if (call_.residual) add_residual(row, y);
      store_row(row, y);
    }
  }

 private:
  static constexpr int kWidth = 8, kGroups = kColumns / kWidth;

  template <class T>
  __device__ __forceinline__ bool whole(const T* data, int64_t stride) const {
    return count_ >= kWidth && aligned(data, stride * static_cast<int64_t>(sizeof(T)));
  }

  __device__ __forceinline__ void add_residual(int64_t row, float (&y)[kWidth]) const {
    with_type(call_.residual_dtype, [&](auto type) {
      const auto* residual = static_cast<const decltype(type)*>(call_.residual);
      float x[kWidth];
      load_vector(residual + row * call_.residual_stride + column_, count_, whole(residual, call_.residual_stride), x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] += x[i];
    });
  }

  __device__ __forceinline__ void store_row(int64_t row, const float (&y)[kWidth]) const {
    const int64_t at = row * call_.columns + column_;
    if (call_.y_dtype == kInt8) {
      const float r = inverse_of(call_.out_scale[row * call_.out_scale_stride]);
      int8_t* const codes = static_cast<int8_t*>(call_.y);
      store_codes(codes + at, count_, count_ >= kWidth && aligned(codes, call_.columns, kWidth), y, r);
    } else {
      with_type(call_.y_dtype, [&](auto type) {
        auto* const out = static_cast<decltype(type)*>(call_.y);
        store_vector(out + at, count_, whole(out, call_.columns), y);
      });
    }
  }

  const Int8Linear& call_;
  const int64_t column_;  // the thread's first
  const int64_t count_;   // how many are there from it on
  float w_scale_[kWidth];
  float bias_[kWidth] = {};
};

}  // namespace distilbert_fast
