// int8_linear:   acc = x_q w_qᵀ exactly in int32;   y = gelu?(acc x_scale w_scale + bias) + residual, or its codes.
//
// One block makes one tile of y, with m16n8k32 products on the tensor cores. Stages of kDepth columns of x_q and w_q
// come by asynchronous copies that run two ahead, and leave shared memory as fragments without bank conflicts. Three
// stages are 48 KB, so that two blocks share a multiprocessor of any architecture. x_q is read once for each tile of
// columns, w_q (a few MB: it stays in L2) once for each tile of rows; blocks that read the same rows of x_q run next to
// each other. The epilogue reads and writes each number once.
//
// Compute capability 9.0 has faster products of its own: int8_linear_sm90.cu.
#include "int8_tile.cuh"

namespace distilbert_fast {
namespace {

constexpr char kOp[] = "int8_linear";
constexpr int64_t kMaxDepth = 131071;  // products of −128 by −128 that int32 can sum

// Four warps share a tile of kRows × kColumns, each a quarter of it.
template <int kRows, int kColumns, int kDepth>
struct Shape {
  static constexpr int rows = kRows, columns = kColumns, depth = kDepth, stages = 3, threads = 128;
  static constexpr int warp_rows = rows / 2, warp_columns = columns / 2;
  static constexpr int stage_bytes = (rows + columns) * depth;
  static constexpr size_t shared_bytes = stages * stage_bytes;
  static_assert(shared_bytes >= Staged<columns>::kBytes && shared_bytes <= 48 << 10);
};
using Large = Shape<128, 128, 64>;
using Small = Shape<64, 64, 128>;

// The products of one stage, added to the warp's accumulators.
template <class S, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply(const unsigned char* x, const unsigned char* w, int row, int column,
                                         int32_t (&acc)[kRowTiles][kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < S::depth / 16; k += 2) {  // chunks
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      ldmatrix_x4(a[i], x + chunk_offset<S::depth>(row + 16 * i + lane % 16, k + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      uint32_t b[4];
      const int of_lane = column + 8 * j + lane % 8 + lane / 16 * 8;
      ldmatrix_x4(b, w + chunk_offset<S::depth>(of_lane, k + lane / 8 % 2));
      const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_m16n8k32(acc[i][j], a[i], even);
        mma_m16n8k32(acc[i][j + 1], a[i], odd);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 2) int8_linear_kernel(const __grid_constant__ Int8Linear call) {
  const unsigned across = static_cast<unsigned>((call.columns + S::columns - 1) / S::columns);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / across) * S::rows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % across) * S::columns;
  const TileLoader<S::rows, S::depth, S::threads> x(call.x, call.x_stride, call.rows, call.depth, first_row);
  const TileLoader<S::columns, S::depth, S::threads> w(call.w, call.w_stride, call.columns, call.depth, first_column);

  unsigned char* const memory = shared_memory();
  const int steps = static_cast<int>((call.depth + S::depth - 1) / S::depth);
  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* const stage = memory + step % S::stages * S::stage_bytes;
      x.load(stage, static_cast<int64_t>(step) * S::depth);
      w.load(stage + S::rows * S::depth, static_cast<int64_t>(step) * S::depth);
    }
    cp_async_commit();
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / 2 * S::warp_rows, column = warp % 2 * S::warp_columns;
  int32_t acc[S::warp_rows / 16][S::warp_columns / 8][4] = {};
  for (int step = 0; step < S::stages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::stages - 2>();
    __syncthreads();  // the stage is complete, and all have done with the one before it
    load(step + S::stages - 1);
    const unsigned char* const stage = memory + step % S::stages * S::stage_bytes;
    multiply<S>(stage, stage + S::rows * S::depth, row, column, acc);
  }
  cp_async_wait<0>();

  finish_tile<S::rows, S::columns, S::threads>(call, first_row, first_column, [&](int pass, const auto& staged) {
    if (row / staged.kRows != pass) return;
#pragma unroll
    for (int i = 0; i < S::warp_rows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < S::warp_columns / 8; ++j) {
        const int at_row = row % staged.kRows + 16 * i + lane / 4, at_column = column + 8 * j + 2 * (lane % 4);
        staged.put(at_row, at_column, acc[i][j][0], acc[i][j][1]);
        staged.put(at_row + 8, at_column, acc[i][j][2], acc[i][j][3]);
      }
    }
  });
}

int64_t tiles(const Int8Linear& call, int rows, int columns) {
  return (call.rows + rows - 1) / rows * ((call.columns + columns - 1) / columns);
}

template <class S>
void launch(const Int8Linear& call, cudaStream_t stream) {
  const int64_t blocks = tiles(call, S::rows, S::columns);
  require(blocks <= INT32_MAX, kOp, "y must be of at most 2^31 - 1 tiles", std::to_string(blocks));
  int8_linear_kernel<S><<<static_cast<unsigned>(blocks), S::threads, S::shared_bytes, stream>>>(call);
}

void check(const Int8Linear& call) {
  const auto text = [](auto x) { return std::to_string(x); };
  require(call.rows >= 0, kOp, "rows must be 0 or more", text(call.rows));
  require(call.columns >= 0, kOp, "columns must be 0 or more", text(call.columns));
  require(call.depth >= 0 && call.depth <= kMaxDepth, kOp, "depth must be from 0 to 131071", text(call.depth));
  require(call.x_stride >= 0, kOp, "x_stride must be 0 or more", text(call.x_stride));
  require(call.w_stride >= 0, kOp, "w_stride must be 0 or more", text(call.w_stride));
  require(call.residual_stride >= 0, kOp, "residual_stride must be 0 or more", text(call.residual_stride));
  const auto check_scale = [&](int64_t stride, const char* expected) {
    require(stride == 0 || stride == 1, kOp, expected, text(stride));
  };
  check_scale(call.x_scale_stride, "x_scale_stride must be 0 or 1");
  check_scale(call.out_scale_stride, "out_scale_stride must be 0 or 1");
  require(is_float(call.bias_dtype), kOp, "bias_dtype must be 0, 1 or 2", text(call.bias_dtype));
  require(is_float(call.residual_dtype), kOp, "residual_dtype must be 0, 1 or 2", text(call.residual_dtype));
  require(is_float(call.y_dtype) || call.y_dtype == kInt8, kOp, "y_dtype must be 0, 1, 2 or 3", text(call.y_dtype));
  if (call.rows == 0 || call.columns == 0) return;
  require(call.x || call.depth == 0, kOp, "x must point to codes", "null");
  require(call.w || call.depth == 0, kOp, "w must point to codes", "null");
  require(call.x_scale, kOp, "x_scale must point to numbers", "null");
  require(call.w_scale, kOp, "w_scale must point to numbers", "null");
  require(call.y, kOp, "y must point to memory", "null");
  require(call.out_scale || call.y_dtype != kInt8, kOp, "out_scale must point to numbers where y is int8", "null");
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), kOp, "cudaDeviceGetAttribute");
  return value;
}

bool is_sm90(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

}  // namespace

void int8_linear(const Int8Linear& call, int device, void* stream) {
  check(call);
  if (call.rows == 0 || call.columns == 0) return;
  const DeviceGuard guard(device, kOp);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  if (tiles(call, Large::rows, Large::columns) < multiprocessors) {
    launch<Small>(call, queue);  // more and smaller tiles, to give every multiprocessor one
  } else if (int8_linear_sm90_built() && is_sm90(device)) {
    int8_linear_sm90(call, device, queue);
  } else {
    launch<Large>(call, queue);
  }
  check_cuda(cudaGetLastError(), kOp, "launch of the kernel");
}

}  // namespace distilbert_fast
