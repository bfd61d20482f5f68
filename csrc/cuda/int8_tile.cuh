// What the int8_linear kernels share: tiles of codes on their way into shared memory, accumulators on their way out.
#pragma once

#include "common.cuh"
#include "entries.h"
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

// Accumulators leave through shared memory, 64 rows at a time, so that each thread finishes 8 neighbours of a row and
// reads and writes device memory 16 bytes at a time.
template <int kColumns>
struct Staged {
  static constexpr int kRows = 64;
  static constexpr int kPitch = kColumns + 8;  // 4 rows of a fragment fall into different banks
  static constexpr size_t kBytes = sizeof(int32_t) * kRows * kPitch;
  int32_t* acc;

  // A fragment's neighbours in a row.
  __device__ __forceinline__ void put(int row, int column, int32_t first, int32_t second) const {
    *reinterpret_cast<Vector<int32_t, 2>*>(acc + row * kPitch + column) = {first, second};
  }
};

// The block's tile of y. put(pass, staged): a warp stages its accumulators, if rows [64 pass, 64 pass + 64) of the tile
// hold them.
template <int kTileRows, int kColumns, int kThreads, class Put>
__device__ __forceinline__ void finish_tile(const Int8Linear& call, int64_t first_row, int64_t first_column, Put put) {
  constexpr int n = 8, kGroups = kColumns / n, kRows = Staged<kColumns>::kRows;
  const Staged<kColumns> staged{reinterpret_cast<int32_t*>(shared_memory())};
  const int group = threadIdx.x % kGroups;
  const int64_t column = first_column + n * group, count = call.columns - column;
  const auto whole = [&](const auto* data, int64_t stride, int bytes = 16) {
    return count >= n && aligned(data, stride * static_cast<int64_t>(sizeof *data), bytes);
  };

  float w_scale[n], bias[n] = {};  // the same for all rows
  load_vector(call.w_scale + column, count, whole(call.w_scale, 0), w_scale);
  if (call.bias) {
    with_type(call.bias_dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(call.bias);
      load_vector(from + column, count, whole(from, 0), bias);
    });
  }

#pragma unroll 1
  for (int pass = 0; pass < kTileRows / kRows; ++pass) {
    __syncthreads();  // all have done with the memory
    put(pass, staged);
    __syncthreads();
#pragma unroll 1
    for (int r = threadIdx.x / kGroups; r < kRows; r += kThreads / kGroups) {
      const int64_t row = first_row + pass * kRows + r;
      if (row >= call.rows || count <= 0) break;
      const auto acc = *reinterpret_cast<const Vector<int32_t, n>*>(staged.acc + r * staged.kPitch + n * group);
      const float x_scale = call.x_scale[row * call.x_scale_stride];
      float y[n];
#pragma unroll
      for (int i = 0; i < n; ++i) y[i] = static_cast<float>(acc.at[i]) * x_scale * w_scale[i] + bias[i];
      if (call.gelu) {
#pragma unroll
        for (int i = 0; i < n; ++i) y[i] = gelu(y[i]);
      }
      if (call.residual) {
        with_type(call.residual_dtype, [&](auto type) {
          const auto* from = static_cast<const decltype(type)*>(call.residual);
          float x[n];
          load_vector(from + row * call.residual_stride + column, count, whole(from, call.residual_stride), x);
#pragma unroll
          for (int i = 0; i < n; ++i) y[i] += x[i];
        });
      }
      const int64_t at = row * call.columns + column;
      if (call.y_dtype == kInt8) {
        const float r_out = inverse_of(call.out_scale[row * call.out_scale_stride]);
        auto* const to = static_cast<int8_t*>(call.y);
        store_codes(to + at, count, whole(to, call.columns, n), y, r_out);
      } else {
        with_type(call.y_dtype, [&](auto type) {
          auto* const to = static_cast<decltype(type)*>(call.y);
          store_vector(to + at, count, whole(to, call.columns), y);
        });
      }
    }
  }
}

// Whether this build has the kernel for compute capability 9.0: with code for sm_90a.
bool int8_linear_sm90_built();
// Called by int8_linear.cu, which has checked everything.
void int8_linear_sm90(const Int8Linear& call, int device, cudaStream_t stream);

}  // namespace distilbert_fast
