// int8_linear on Hopper: the tiles, copies and epilogue of int8_linear.cu, with the asynchronous products of a
// warpgroup. Two warpgroups share a tile of y, 64 rows each; both multiply straight from shared memory, so that
// accumulators are all that registers hold.
//
// A stage is 128 columns of x_q and w_q: one row of a stage is one row of the 128-byte swizzle. While the products of
// step s run, their threads begin the copies of step s + 2, into the stage whose products (of step s − 1) both
// warpgroups had finished at the last barrier. Three stages are 96 KB, so that two blocks share a multiprocessor: one
// multiplies while the other waits, or writes its results.
#include "int8_tile.cuh"
#include "wgmma.cuh"

namespace distilbert_fast {
namespace {

constexpr char kOp[] = "int8_linear";
constexpr int kRows = 128, kColumns = 128, kDepth = 128, kStages = 3, kThreads = 256;
constexpr int kTileBytes = kRows * kDepth;  // of x_q, and as many of w_q
constexpr size_t kSharedBytes = kStages * 2 * kTileBytes;
static_assert(kRows == kColumns && kSharedBytes >= Staged<kColumns>::kBytes);

// Describes codes to wgmma that lie as chunk_offset<128> has them, from a row that is a multiple of 8 on.
[[maybe_unused]] __device__ __forceinline__ uint64_t descriptor(const void* codes) {
  constexpr uint64_t kBetween8Rows = 8 * kDepth, kSwizzled128 = 1;
  return (shared_address(codes) & 0x3ffff) >> 4 | uint64_t{1} << 16 | kBetween8Rows >> 4 << 32 | kSwizzled128 << 62;
}

__global__ void __launch_bounds__(kThreads, 2) int8_linear_sm90_kernel(const __grid_constant__ Int8Linear call) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const unsigned across = static_cast<unsigned>((call.columns + kColumns - 1) / kColumns);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / across) * kRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % across) * kColumns;
  const TileLoader<kRows, kDepth, kThreads> x(call.x, call.x_stride, call.rows, call.depth, first_row);
  const TileLoader<kColumns, kDepth, kThreads> w(call.w, call.w_stride, call.columns, call.depth, first_column);

  unsigned char* const memory = shared_memory();
  const int steps = static_cast<int>((call.depth + kDepth - 1) / kDepth);
  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* const stage = memory + step % kStages * 2 * kTileBytes;
      x.load(stage, static_cast<int64_t>(step) * kDepth);
      w.load(stage + kTileBytes, static_cast<int64_t>(step) * kDepth);
    }
    cp_async_commit();
  };

  const int warpgroup = threadIdx.x / 128;
  int32_t acc[64] = {};
  load(0);
  load(1);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    fence_proxy_async();
    __syncthreads();  // the stage is complete
    const unsigned char* const stage = memory + step % kStages * 2 * kTileBytes;
    const uint64_t of_x = descriptor(stage + warpgroup * 64 * kDepth), of_w = descriptor(stage + kTileBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; k += 2) wgmma_m64n128k32(acc, of_x + k, of_w + k);  // chunks, as addresses are
    wgmma_commit();
    load(step + 2);
    wgmma_wait<0>(acc);
  }
  cp_async_wait<0>();

  finish_tile<kRows, kColumns, kThreads>(call, first_row, first_column, [&](int pass, const auto& staged) {
    if (warpgroup != pass) return;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
      staged.put(row, column, acc[4 * j], acc[4 * j + 1]);
      staged.put(row + 8, column, acc[4 * j + 2], acc[4 * j + 3]);
    }
  });
#endif
}

}  // namespace

bool int8_linear_sm90_built() {
#ifdef DISTILBERT_FAST_SM90A
  return true;
#else
  return false;
#endif
}

void int8_linear_sm90(const Int8Linear& call, int device, cudaStream_t stream) {
  const int64_t blocks = (call.rows + kRows - 1) / kRows * ((call.columns + kColumns - 1) / kColumns);
  require(blocks <= INT32_MAX, kOp, "y must be of at most 2^31 - 1 tiles", std::to_string(blocks));
  allow_shared_memory<int8_linear_sm90_kernel>(kSharedBytes, device, kOp);
  int8_linear_sm90_kernel<<<static_cast<unsigned>(blocks), kThreads, kSharedBytes, stream>>>(call);
}

}  // namespace distilbert_fast
