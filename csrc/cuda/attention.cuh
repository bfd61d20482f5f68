// What attention forward and backward share: where the tokens of a block lie, tiles of 64 tokens in shared memory, the
// two matrix products on them, dropout, and how results leave.
//
// Four warps make a block; each has 16 rows of a result, or a few times 16, across all columns. mma.sync leaves
// element (row g, columns 2t, 2t + 1) and (row g + 8, the same) of every 16×8 piece with lane 4g + t: `float x[4]`. Two
// neighbouring pieces, rounded, are the left operand of the next product just as they are, so scores never leave the
// registers.
#pragma once

#include <cmath>

#include "common.cuh"
#include "entries.h"
#include "mma.cuh"

namespace distilbert_fast {
namespace {

constexpr int kTokens = 64;  // of a tile
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr uint64_t kAll = ~uint64_t{0};

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// Of a call, for its kernels.
struct Constants {
  float scale, c;      // c = scale · log2(e)
  float kept;          // 1 / (1 − p): what dropout multiplies by that which it does not drop
  uint32_t threshold;  // p · 2^32
  bool aligned;        // all heads lie in whole 16 bytes

  Constants(const AttentionCall& call, bool aligned)
      : scale(static_cast<float>(call.scale)),
        c(static_cast<float>(1.4426950408889634 * call.scale)),
        kept(static_cast<float>(1 / (1 - call.dropout_p))),
        threshold(static_cast<uint32_t>(call.dropout_p * 4294967296.0)),
        aligned(aligned) {}
};

// Tokens ----------------------------------------------------------------------------------------------------------

__host__ __device__ __forceinline__ int64_t all_tokens(const AttentionSequences& sequences) {
  return sequences.cu_seqlens ? sequences.tokens : sequences.batch * sequences.length;
}

struct Sequence {
  int index;
  int begin;   // its first token among all: 0 where it is padded
  int length;  // tokens, padding included
  const bool* mask;
};

__device__ __forceinline__ int clamp_to(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

__device__ __forceinline__ Sequence sequence_at(const AttentionSequences& sequences, int index) {
  const int length = static_cast<int>(sequences.length), tokens = static_cast<int>(sequences.tokens);
  if (!sequences.cu_seqlens) {
    const bool* mask = sequences.mask ? sequences.mask + int64_t{index} * length : nullptr;
    return {index, 0, length, mask};
  }
  const int begin = clamp_to(sequences.cu_seqlens[index], 0, tokens);
  return {index, begin, clamp_to(sequences.cu_seqlens[index + 1], begin, tokens) - begin, nullptr};
}

// Some tokens of a sequence, for one block.
struct Rows {
  Sequence sequence;
  int first, count;  // 0: there are none
};

// The rows of block `tile`. Packed sequence b begins with tile cu_seqlens[b] / rows + b, and so never needs one of the
// next sequence's: the host launches tokens / rows + batch blocks and does not ask how long the sequences are. All 32
// lanes look for b at once.
template <int rows>
__device__ __forceinline__ Rows rows_of(const AttentionSequences& sequences, int tile) {
  const auto found = [&](int b, int64_t first) -> Rows {
    const Sequence sequence = sequence_at(sequences, b);
    if (first < 0 || first >= sequence.length) return {sequence, 0, 0};
    const int left = sequence.length - static_cast<int>(first);
    return {sequence, static_cast<int>(first), left < rows ? left : rows};
  };
  if (!sequences.cu_seqlens) {
    const int tiles = static_cast<int>((sequences.length + rows - 1) / rows);
    return found(tile / tiles, int64_t{tile % tiles} * rows);
  }
  const auto first_tile = [&](int b) { return sequences.cu_seqlens[b] / rows + b; };
  int b = 0;
  for (int count = static_cast<int>(sequences.batch); count > 1;) {  // it is one of [b, b + count)
    const int step = (count + 31) / 32, ahead = lane_index() * step;
    const bool reached = ahead < count && first_tile(b + ahead) <= tile;
    const int steps = __popc(__ballot_sync(0xffffffffu, reached)) - 1;
    const int taken = steps > 0 ? steps * step : 0;
    b += taken;
    count = step < count - taken ? step : count - taken;
  }
  return found(b, int64_t{tile - first_tile(b)} * rows);
}

// Which of the 64 tokens from `first` on count, bit by bit. Asked by whole warps.
__device__ __forceinline__ uint64_t counted(const Sequence& sequence, int first) {
  const int left = sequence.length - first;
  if (!sequence.mask) return left >= kTokens ? kAll : left <= 0 ? 0 : kAll >> (kTokens - left);
  const auto counts = [&](int i) { return i < left && sequence.mask[first + i]; };
  const uint32_t low = __ballot_sync(0xffffffffu, counts(lane_index()));
  const uint32_t high = __ballot_sync(0xffffffffu, counts(lane_index() + 32));
  return uint64_t{high} << 32 | low;
}

struct Tokens {
  int first;
  uint64_t counted;  // 0: there are no more
  int rank;          // how many tokens of the sequence count before these

  // The place of token first + i among those that count.
  __device__ __forceinline__ int rank_of(int i) const { return rank + __popcll(counted & ((uint64_t{1} << i) - 1)); }
};

// The next 64 tokens from `first` on, less those tiles that are padding only.
__device__ __forceinline__ Tokens next_tokens(const Sequence& sequence, int first = 0, int rank = 0) {
  for (; first < sequence.length; first += kTokens) {
    const uint64_t bits = counted(sequence, first);
    if (bits) return {first, bits, rank};
  }
  return {first, 0, rank};
}

__device__ __forceinline__ Tokens next_tokens(const Sequence& sequence, const Tokens& last) {
  return next_tokens(sequence, last.first + kTokens, last.rank + __popcll(last.counted));
}

// The 64 tokens from `first` on, and behind some.
__device__ __forceinline__ Tokens tokens_at(const Sequence& sequence, int first, bool with_rank) {
  int rank = sequence.mask ? 0 : first;
  for (int i = 0; i < first && with_rank && sequence.mask; i += kTokens) rank += __popcll(counted(sequence, i));
  return {first, counted(sequence, first), rank};
}

__device__ __forceinline__ Tokens tokens_after(const Sequence& sequence, const Tokens& last) {
  return {last.first + kTokens, counted(sequence, last.first + kTokens), last.rank + __popcll(last.counted)};
}

// Token 0 of a sequence and head.
template <class T, class Pointer>
__device__ __forceinline__ T* head_of(const AttentionTensor<Pointer>& x, const Sequence& sequence, int head) {
  return static_cast<T*>(x.data) + sequence.index * x.sequence + sequence.begin * x.token + head * x.head;
}

// Token 0 of a sequence and head in [heads, all tokens].
template <class T>
__device__ __forceinline__ T* row_of(T* x, const AttentionCall& call, const Sequence& sequence, int head) {
  const AttentionSequences& all = call.sequences;
  return x + head * all_tokens(all) + sequence.index * (all.cu_seqlens ? 0 : all.length) + sequence.begin;
}

__device__ __forceinline__ float head_mask_of(const AttentionCall& call, int sequence, int head) {
  return call.head_mask ? call.head_mask[sequence * call.head_mask_stride + head] : 1;
}

// Tiles -----------------------------------------------------------------------------------------------------------

// Eight neighbours, 16 bytes, of a row in shared memory [rows, size]. They change places within 128 bytes, so that
// eight rows' lie in different banks.
template <int size, class T>
__device__ __forceinline__ T* eight_at(T* tile, unsigned row, unsigned eight) {
  constexpr unsigned kEights = size / 8, kRowsOfBanks = kEights < 8 ? 8 / kEights : 1;
  const unsigned place = eight ^ (row / kRowsOfBanks % (kEights < 8 ? kEights : 8));
  return tile + row * size + place * 8;
}

// 64 rows of x, `stride` elements apart, into a tile: 0 in place of rows that do not count and of columns past
// head_size. Not there before cp_async_wait and __syncthreads.
template <int size, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* x, int64_t stride, uint64_t counts, int head_size,
                                          bool aligned) {
  constexpr int kEights = size / 8, kRowsAtOnce = kThreads / kEights;  // whole turns of the places of eights
  const int index = static_cast<int>(threadIdx.x), column = index % kEights * 8;
  int row = index / kEights;
  T* to = eight_at<size>(tile, row, column / 8);
  x += row * stride + column;
  if (aligned) {
    const bool inside = column < head_size;
#pragma unroll
    for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
      cp_async_16(to + i * kRowsAtOnce * size, x, inside && (counts >> row & 1));
      row += kRowsAtOnce;
      x += kRowsAtOnce * stride;
    }
    return;
  }
#pragma unroll 1
  for (; row < kTokens; row += kRowsAtOnce, to += kRowsAtOnce * size, x += kRowsAtOnce * stride) {
#pragma unroll 1
    for (int j = 0; j < 8; ++j) to[j] = (counts >> row & 1) && column + j < head_size ? x[j] : T{};
  }
}

// f(element, row of the warp, column) for all elements that this lane has of [16 · tiles, 8 · columns].
template <int tiles, int columns, class Function>
__device__ __forceinline__ void each(float (&x)[tiles][columns][4], const Function& f) {
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int n = 0; n < columns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f(x[t][n][i], 16 * t + lane_index() / 4 + i / 2 * 8, 8 * n + lane_index() % 4 * 2 + i % 2);
      }
    }
  }
}

// Two pieces, side by side, gain left · right.
template <class T>
__device__ __forceinline__ void multiply_pair(float (&x)[4], float (&y)[4], const uint32_t (&left)[4],
                                              const uint32_t (&right)[4]) {
  const uint32_t of_x[2] = {right[0], right[1]}, of_y[2] = {right[2], right[3]};
  mma_m16n8k16(x, left, of_x, T{});
  mma_m16n8k16(y, left, of_y, T{});
}

// x = left · rightᵀ: rows of one tile, from `left_row` on, with rows of another, from `right_row` on, which are columns
// of the result.
template <int size, class T, int tiles, int columns>
__device__ __forceinline__ void multiply_transposed(float (&x)[tiles][columns][4], T* left, int left_row, T* right,
                                                    int right_row = 0) {
  const int lane = lane_index();
  each(x, [](float& element, int, int) { element = 0; });
#pragma unroll
  for (int k = 0; k < size / 16; ++k) {
    uint32_t a[tiles][4], b[4];
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      ldmatrix_x4(a[t], eight_at<size>(left, left_row + 16 * t + lane % 16, 2 * k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < columns; n += 2) {
      ldmatrix_x4(b, eight_at<size>(right, right_row + 8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < tiles; ++t) multiply_pair<T>(x[t][n], x[t][n + 1], a[t], b);
    }
  }
}

// x += p · right, p rounded to T: the tile's rows, from `right_row` on, meet the columns of p.
template <int size, class T, int tiles, int columns>
__device__ __forceinline__ void multiply_add(float (&x)[tiles][size / 8][4], const float (&p)[tiles][columns][4],
                                             T* right, int right_row = 0) {
#pragma unroll
  for (int k = 0; k < columns; k += 2) {
    uint32_t a[tiles][4], b[4];
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[t][i] = pack2(p[t][k + i / 2][i % 2 * 2], p[t][k + i / 2][i % 2 * 2 + 1], T{});
    }
#pragma unroll
    for (int n = 0; n < size / 8; n += 2) {
      ldmatrix_x4_trans(b, eight_at<size>(right, right_row + 8 * k + lane_index() % 16, n + lane_index() / 16));
#pragma unroll
      for (int t = 0; t < tiles; ++t) multiply_pair<T>(x[t][n], x[t][n + 1], a[t], b);
    }
  }
}

// The four lanes that share a row.
template <class Operation>
__device__ __forceinline__ float reduce_row(float x, Operation operation) {
  x = operation(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return operation(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The rows of a warp, each times its factor, to memory; 0 where the factor is 0, whatever x is. `staging` holds the
// warp's rows and nobody else's; rows from `count` on stay unwritten.
template <int size, class T, int tiles>
__device__ __forceinline__ void store_rows(const float (&x)[tiles][size / 8][4], const float (&factor)[tiles][2],
                                           T* staging, T* out, int64_t stride, int count, int head_size, bool aligned) {
  constexpr int kEights = size / 8, kRowsAtOnce = 32 / kEights;
  const int lane = lane_index();
  const auto times = [](float value, float f) { return f == 0 ? 0 : value * f; };
  __syncwarp();  // what the staging held has been read
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        T* to = eight_at<size>(staging, 16 * t + lane / 4 + 8 * i, n) + 2 * (lane % 4);
        const float f = factor[t][i];
        *reinterpret_cast<uint32_t*>(to) = pack2(times(x[t][n][2 * i], f), times(x[t][n][2 * i + 1], f), T{});
      }
    }
  }
  __syncwarp();
  int row = lane / kEights;
  const int column = lane % kEights * 8;
  if (column >= head_size) return;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < 16 * tiles / kRowsAtOnce; ++i, row += kRowsAtOnce) {
      if (row >= count) return;
      const uint4 eight = *reinterpret_cast<const uint4*>(eight_at<size>(staging, row, column / 8));
      *reinterpret_cast<uint4*>(out + row * stride + column) = eight;
    }
    return;
  }
#pragma unroll 1
  for (; row < 16 * tiles && row < count; row += kRowsAtOnce) {
    const T* eight = eight_at<size>(staging, row, column / 8);
#pragma unroll 1
    for (int j = 0; j < 8 && column + j < head_size; ++j) out[row * stride + column + j] = eight[j];
  }
}

// Zeros in rows [0, count) of a block.
template <class T>
__device__ __forceinline__ void store_zeros(T* out, int64_t stride, int count, int head_size) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * head_size; i += kThreads) {
    out[i / head_size * stride + i % head_size] = T{};
  }
}

// Scores ----------------------------------------------------------------------------------------------------------

// Scores of keys that do not count become −∞.
template <int tiles, int columns>
__device__ __forceinline__ void hide(float (&s)[tiles][columns][4], uint64_t counts) {
  const int of_lane = lane_index() % 4 * 2;
  const uint64_t counts_here = counts >> of_lane;
  each(s, [&](float& x, int, int key) {
    if (!(counts_here >> (key - of_lane) & 1)) x = -INFINITY;
  });
}

// Dropout: 32 random bits for each (sequence · heads + head, query, key) of a seed, queries and keys by their place
// among the tokens that count, as in csrc/cpu/attention_heads.h and bit for bit the same.
__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

struct Dropout {
  uint64_t bits;  // of the (sequence, head) pair
  uint32_t threshold;

  __device__ __forceinline__ Dropout(const AttentionCall& call, const Constants& constants, int sequence, int head)
      : bits(call.seed ? mix(static_cast<uint64_t>(*call.seed) + static_cast<uint64_t>(sequence * call.heads + head))
                       : 0),
        threshold(constants.threshold) {}
  __device__ __forceinline__ uint64_t of_query(int rank) const { return mix(bits + static_cast<uint64_t>(rank)); }
  __device__ __forceinline__ bool drops(uint64_t of_query, int key_rank) const {
    uint32_t x = static_cast<uint32_t>(key_rank) + static_cast<uint32_t>(of_query);
    x = ((x ^ x >> 16) * 0x7feb352du) ^ static_cast<uint32_t>(of_query >> 32);
    x = (x ^ x >> 15) * 0x846ca68bu;
    return (x ^ x >> 16) < threshold;
  }
};

// Host ------------------------------------------------------------------------------------------------------------

constexpr char kOp[] = "attention";

template <class Pointer>
bool in_sixteens(const AttentionTensor<Pointer>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.sequence % 8 == 0 && x.token % 8 == 0 && x.head % 8 == 0;
}

inline bool any_token(const AttentionCall& call) {
  return call.heads > 0 && call.sequences.batch > 0 && all_tokens(call.sequences) > 0;
}

inline void check(const AttentionCall& call) {
  const auto text = [](auto x) { return std::to_string(x); };
  const auto fits = [&](const char* name, int64_t x, int64_t low, int64_t high) {
    const std::string expected = std::string(name) + " must be " + text(low) + " to " + text(high);
    require(x >= low && x <= high, kOp, expected.c_str(), text(x));
  };
  const AttentionSequences& sequences = call.sequences;
  fits("batch", sequences.batch, 0, INT32_MAX / 2);
  constexpr int64_t kMostTokens = INT32_MAX - 2 * kTokens;  // the end of the last tile fits in an int
  fits("tokens", sequences.tokens, 0, kMostTokens);
  fits("length", sequences.length, 0, kMostTokens);
  fits("heads", call.heads, 0, 65535);  // the height of a grid
  fits("head_size", call.head_size, 1, kAttentionMaxHeadSize);
  fits("dtype", call.dtype, kBFloat16, kFloat16);
  require(std::isfinite(call.scale) && call.scale > 0, kOp, "scale must be finite and above 0", text(call.scale));
  require(call.dropout_p >= 0 && call.dropout_p < 1, kOp, "dropout_p must be at least 0 and below 1",
          text(call.dropout_p));
  require(call.seed || call.dropout_p == 0, kOp, "seed must point to a number where there is dropout", "null");
  const bool present = call.q.data && call.k.data && call.v.data;
  require(present || !any_token(call), kOp, "q, k and v must point to memory", "null");
}

constexpr int kLeastShared = 99 << 10;  // bytes that a block may have on every GPU: those of 8.6 and 8.9 give no more

// Blocks that take `rows` tokens each: enough for any sequences.
inline dim3 grid_of(const AttentionCall& call, int rows) {
  const AttentionSequences& sequences = call.sequences;
  const int64_t tiles = sequences.cu_seqlens ? sequences.tokens / rows + sequences.batch
                                             : (sequences.length + rows - 1) / rows * sequences.batch;
  require(tiles <= INT32_MAX, kOp, "tiles of tokens must be 2147483647 or fewer", std::to_string(tiles));
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(call.heads));
}

// function(x, n): x of the C++ type of the call's dtype, n the size to which heads are filled up.
template <class Function>
void with_head(const AttentionCall& call, const Function& function) {
  const auto sized = [&](auto x) {
    if (call.head_size <= 32) return function(x, std::integral_constant<int, 32>{});
    if (call.head_size <= 64) return function(x, std::integral_constant<int, 64>{});
    return function(x, std::integral_constant<int, 128>{});
  };
  if (call.dtype == kBFloat16) sized(__nv_bfloat16{});
  if (call.dtype == kFloat16) sized(__half{});
}

}  // namespace
}  // namespace distilbert_fast
