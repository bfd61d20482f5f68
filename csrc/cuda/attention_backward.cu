// attention backward. With p = 2^(s c − m) / Z as forward left m and Z, g = d loss / d o, dp = drop(g vᵀ) and
// r = rowsum(p ∘ dp) = rowsum(g ∘ o), o before the head mask:
//
//     ds = p ∘ (dp − r)    dq = m_h · scale · ds k    dk = m_h · scale · dsᵀ q    dv = m_h · drop(p)ᵀ g    dm_h = Σ r
//
// Three kernels, each result with one writer and one order of sums, so that the same input gives the same bits:
//   queries: a block takes 64 queries, finds their r, and runs through keys and values for dq;
//   keys:    a block takes 64 keys and runs through q and g for dk and dv, its scores transposed: rows are keys;
//   mask:    a block takes one head of a sequence and adds up r, if dm is wanted.
// Scores are computed again in both of the first two, seven products where five would do with atomics, and dropped
// again by the same hash; nothing as large as they are is stored.
#include "attention.cuh"

namespace distilbert_fast {
namespace {

// Tiles of two tensors: the block's own rows, and by turns, in two stages, all rows.
template <class T, int size>
struct Tiles {
  T own[2][kTokens * size];
  T all[2][2][kTokens * size];  // [stage][tensor]
};

template <class T, int size>
struct QueriesShared {
  Tiles<T, size> tiles;      // q and g; k and v
  uint64_t random[kTokens];  // of the dropout
  int rank[2][kTokens];      // of the keys, for the dropout
};

template <class T, int size>
struct KeysShared {
  Tiles<T, size> tiles;  // k and v; q and g
  struct {
    float m[kTokens], one_over_z[kTokens], r[kTokens];
    uint64_t random[kTokens];  // of the dropout
  } of_queries[2];
};

// The block's own rows of a tensor.
template <int size, class T>
__device__ __forceinline__ void load_own(T* tile, const AttentionTensor<const void*>& x, const Sequence& sequence,
                                         int head, const Tokens& own, int head_size, bool aligned) {
  const T* rows = head_of<const T>(x, sequence, head) + own.first * x.token;
  load_tile<size>(tile, rows, x.token, own.counted, head_size, aligned);
}

// rowsum(x ∘ y) of the rows lane / 4 and lane / 4 + 8 of a warp's 16, which begin at `row` of two tiles.
template <int size, class T>
__device__ __forceinline__ void row_products(float (&sums)[2], T* x, T* y, int row) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0;
#pragma unroll
    for (int eight = 0; eight < size / 8; eight += 4) {
      alignas(16) T of_x[8], of_y[8];
      const int at = row + lane_index() / 4 + 8 * i, column = eight + lane_index() % 4;
      *reinterpret_cast<uint4*>(of_x) = *reinterpret_cast<const uint4*>(eight_at<size>(x, at, column));
      *reinterpret_cast<uint4*>(of_y) = *reinterpret_cast<const uint4*>(eight_at<size>(y, at, column));
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(to_float(of_x[j]), to_float(of_y[j]), sum);
    }
    sums[i] = reduce_row(sum, Sum());
  }
}

template <class T, int size>
__global__ void __launch_bounds__(kThreads, 2)
    queries_kernel(const AttentionBackward backward, const Constants constants) {
  const AttentionCall& call = backward.call;
  const Rows block = rows_of<kTokens>(call.sequences, blockIdx.x);
  if (block.count == 0) return;
  const Sequence& sequence = block.sequence;
  const int first = block.first, head = blockIdx.y, head_size = static_cast<int>(call.head_size);
  const Tokens queries = tokens_at(sequence, first, call.seed);
  const float mask = head_mask_of(call, sequence.index, head);
  T* dq = head_of<T>(backward.dq, sequence, head) + first * backward.dq.token;
  const bool nothing = mask == 0 || queries.counted == 0;  // but r
  if (nothing) store_zeros(dq, backward.dq.token, block.count, head_size);
  if (mask == 0 && !call.every_head) return;

  auto& shared = *reinterpret_cast<QueriesShared<T, size>*>(shared_memory());
  T *q_tile = shared.tiles.own[0], *g_tile = shared.tiles.own[1];
  T* o_tile = shared.tiles.all[1][0];  // before the second tile of keys
  const int thread = static_cast<int>(threadIdx.x);
  const T* k = head_of<const T>(call.k, sequence, head);
  const T* v = head_of<const T>(call.v, sequence, head);
  const auto load_keys = [&](const Tokens& keys, int stage) {
    auto& tiles = shared.tiles.all[stage];
    load_tile<size>(tiles[0], k + keys.first * call.k.token, call.k.token, keys.counted, head_size, constants.aligned);
    load_tile<size>(tiles[1], v + keys.first * call.v.token, call.v.token, keys.counted, head_size, constants.aligned);
    if (call.seed && thread < kTokens) shared.rank[stage][thread] = keys.rank_of(thread);
  };
  load_own<size>(q_tile, call.q, sequence, head, queries, head_size, constants.aligned);
  load_own<size>(g_tile, backward.g, sequence, head, queries, head_size, constants.aligned);
  load_own<size>(o_tile, backward.o, sequence, head, queries, head_size, constants.aligned);
  cp_async_commit();
  Tokens keys = nothing ? Tokens{0, 0, 0} : next_tokens(sequence);
  if (keys.counted) load_keys(keys, 0);
  cp_async_commit();
  const Dropout dropout(call, constants, sequence.index, head);
  if (call.seed && thread < kTokens) shared.random[thread] = dropout.of_query(queries.rank_of(thread));
  cp_async_wait<1>();
  __syncthreads();

  const int row = warp_index() * 16, lane = lane_index();
  float r[2], m[2] = {0, 0}, one_over_z[2] = {0, 0};
  row_products<size>(r, g_tile, o_tile, row);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = row + lane / 4 + 8 * i;
    if (!call.every_head) r[i] /= mask;  // o is behind the mask
    if (lane % 4 == 0 && at < block.count) row_of(backward.r, call, sequence, head)[first + at] = r[i];
    if (nothing || !(queries.counted >> at & 1)) continue;
    const float* stats = row_of(backward.stats, call, sequence, head) + first + at;
    m[i] = *stats;
    one_over_z[i] = stats[call.heads * all_tokens(call.sequences)];
  }

  const float c = constants.c;
  float sum[1][size / 8][4] = {};
  for (int stage = 0; keys.counted; stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody needs the one before
    const Tokens next = next_tokens(sequence, keys);
    if (next.counted) load_keys(next, stage ^ 1);
    cp_async_commit();
    if (row < block.count) {
      T *k_tile = shared.tiles.all[stage][0], *v_tile = shared.tiles.all[stage][1];
      float ds[1][kTokens / 8][4], dp[1][kTokens / 8][4];
      multiply_transposed<size>(ds, q_tile, row, k_tile);
      multiply_transposed<size>(dp, g_tile, row, v_tile);
      if (keys.counted != kAll) hide(ds, keys.counted);
      if (call.seed) {
        each(dp, [&](float& x, int at, int key) {
          x = dropout.drops(shared.random[row + at], shared.rank[stage][key]) ? 0 : x * constants.kept;
        });
      }
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = ex2(fmaf(ds[0][n][i], c, -m[i / 2])) * one_over_z[i / 2];
          ds[0][n][i] = p * (dp[0][n][i] - r[i / 2]);
        }
      }
      multiply_add<size>(sum, ds, k_tile);
    }
    keys = next;
  }
  if (nothing) return;

  const uint64_t counts = counted(sequence, first);
  float factor[1][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factor[0][i] = counts >> (row + lane / 4 + 8 * i) & 1 ? mask * constants.scale : 0;
  }
  store_rows<size>(sum, factor, q_tile + row * size, dq + row * backward.dq.token, backward.dq.token, block.count - row,
                   head_size, constants.aligned);
}

template <class T, int size>
__global__ void __launch_bounds__(kThreads, 2)
    keys_kernel(const AttentionBackward backward, const Constants constants) {
  constexpr int kAtOnce = size <= 64 ? 32 : 16;  // queries, lest registers run out
  const AttentionCall& call = backward.call;
  const Rows block = rows_of<kTokens>(call.sequences, blockIdx.x);
  if (block.count == 0) return;
  const Sequence& sequence = block.sequence;
  const int first = block.first, head = blockIdx.y, head_size = static_cast<int>(call.head_size);
  const Tokens keys = tokens_at(sequence, first, call.seed);
  const float mask = head_mask_of(call, sequence.index, head);
  T* dk = head_of<T>(backward.dk, sequence, head) + first * backward.dk.token;
  T* dv = head_of<T>(backward.dv, sequence, head) + first * backward.dv.token;
  if (mask == 0 || keys.counted == 0) {
    store_zeros(dk, backward.dk.token, block.count, head_size);
    store_zeros(dv, backward.dv.token, block.count, head_size);
    return;
  }

  auto& shared = *reinterpret_cast<KeysShared<T, size>*>(shared_memory());
  T *k_tile = shared.tiles.own[0], *v_tile = shared.tiles.own[1];
  const T* q = head_of<const T>(call.q, sequence, head);
  const T* g = head_of<const T>(backward.g, sequence, head);
  const auto load_queries = [&](const Tokens& queries, int stage) {
    auto& tiles = shared.tiles.all[stage];
    load_tile<size>(tiles[0], q + queries.first * call.q.token, call.q.token, queries.counted, head_size,
                    constants.aligned);
    load_tile<size>(tiles[1], g + queries.first * backward.g.token, backward.g.token, queries.counted, head_size,
                    constants.aligned);
  };
  // A thread brings m and 1 / Z, or r, of one query. One that does not count has p = ds = 0.
  const int mine = static_cast<int>(threadIdx.x) % kTokens;
  const bool brings_stats = threadIdx.x < kTokens;
  struct Numbers {
    float m_or_r, one_over_z;
  };
  const auto load_numbers = [&](const Tokens& queries) -> Numbers {
    if (!(queries.counted >> mine & 1)) return {0, 0};
    const int at = queries.first + mine;
    if (!brings_stats) return {row_of(backward.r, call, sequence, head)[at], 0};
    const float* stats = row_of(backward.stats, call, sequence, head) + at;
    return {*stats, stats[call.heads * all_tokens(call.sequences)]};
  };

  load_own<size>(k_tile, call.k, sequence, head, keys, head_size, constants.aligned);
  load_own<size>(v_tile, call.v, sequence, head, keys, head_size, constants.aligned);
  Tokens queries = next_tokens(sequence);
  load_queries(queries, 0);
  cp_async_commit();
  Numbers numbers = load_numbers(queries);

  const int row = warp_index() * 16, lane = lane_index();
  const float c = constants.c;
  const Dropout dropout(call, constants, sequence.index, head);
  const int ranks[2] = {keys.rank_of(row + lane / 4), keys.rank_of(row + lane / 4 + 8)};
  float dk_sum[1][size / 8][4] = {}, dv_sum[1][size / 8][4] = {};
  for (int stage = 0; queries.counted; stage ^= 1) {
    auto& of_queries = shared.of_queries[stage];
    if (brings_stats) {
      of_queries.m[mine] = numbers.m_or_r;
      of_queries.one_over_z[mine] = numbers.one_over_z;
      if (call.seed) of_queries.random[mine] = dropout.of_query(queries.rank_of(mine));
    } else {
      of_queries.r[mine] = numbers.m_or_r;
    }
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody needs the one before
    const Tokens next = next_tokens(sequence, queries);
    if (next.counted) load_queries(next, stage ^ 1);
    cp_async_commit();
    numbers = load_numbers(next);
    T *q_tile = shared.tiles.all[stage][0], *g_tile = shared.tiles.all[stage][1];
#pragma unroll 1
    for (int begin = 0; begin < kTokens && row < block.count; begin += kAtOnce) {
      float p[1][kAtOnce / 8][4], ds[1][kAtOnce / 8][4];  // [keys, queries]
      multiply_transposed<size>(p, k_tile, row, q_tile, begin);
      multiply_transposed<size>(ds, v_tile, row, g_tile, begin);
#pragma unroll
      for (int n = 0; n < kAtOnce / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = begin + 8 * n + lane % 4 * 2 + i % 2;
          float &of_p = p[0][n][i], &of_ds = ds[0][n][i];
          of_p = ex2(fmaf(of_p, c, -of_queries.m[query])) * of_queries.one_over_z[query];
          const bool drops = call.seed && dropout.drops(of_queries.random[query], ranks[i / 2]);
          of_ds = of_p * ((drops ? 0 : of_ds * constants.kept) - of_queries.r[query]);
          if (drops) of_p = 0;
        }
      }
      multiply_add<size>(dv_sum, p, g_tile, begin);
      multiply_add<size>(dk_sum, ds, q_tile, begin);
    }
    queries = next;
  }

  const uint64_t counts = counted(sequence, first);
  float of_dk[1][2], of_dv[1][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float m = counts >> (row + lane / 4 + 8 * i) & 1 ? mask : 0;
    of_dk[0][i] = m * constants.scale;
    of_dv[0][i] = m * constants.kept;
  }
  store_rows<size>(dk_sum, of_dk, k_tile + row * size, dk + row * backward.dk.token, backward.dk.token,
                   block.count - row, head_size, constants.aligned);
  store_rows<size>(dv_sum, of_dv, v_tile + row * size, dv + row * backward.dv.token, backward.dv.token,
                   block.count - row, head_size, constants.aligned);
}

__global__ void __launch_bounds__(kThreads) mask_kernel(const AttentionBackward backward) {
  const AttentionCall& call = backward.call;
  const Sequence sequence = sequence_at(call.sequences, blockIdx.x);
  const float* r = row_of(backward.r, call, sequence, blockIdx.y);
  float sum[1] = {0};
  for (int i = threadIdx.x; i < sequence.length; i += kThreads) sum[0] += r[i];
  block_reduce(sum, Sum());
  if (threadIdx.x == 0) backward.dm[blockIdx.x * call.heads + blockIdx.y] = sum[0];
}

}  // namespace

void attention_backward(const AttentionBackward& backward, int device, void* stream) {
  const AttentionCall& call = backward.call;
  check(call);
  require(call.every_head || !backward.dm, kOp, "every_head must be true where dm is wanted", "false");
  if (call.heads == 0 || call.sequences.batch == 0) return;
  const DeviceGuard guard(device, kOp);
  const auto on = static_cast<cudaStream_t>(stream);
  if (any_token(call)) {
    const bool present = backward.g.data && backward.o.data && backward.stats && backward.r && backward.dq.data &&
                         backward.dk.data && backward.dv.data;
    require(present, kOp, "do, o, stats, r, dq, dk and dv must point to memory", "null");
    const bool aligned = call.head_size % 8 == 0 && in_sixteens(call.q) && in_sixteens(call.k) && in_sixteens(call.v) &&
                         in_sixteens(backward.g) && in_sixteens(backward.o) && in_sixteens(backward.dq) &&
                         in_sixteens(backward.dk) && in_sixteens(backward.dv);
    const Constants constants(call, aligned);
    const dim3 grid = grid_of(call, kTokens);
    with_head(call, [&](auto x, auto size) {
      using T = decltype(x);
      constexpr int kQueriesBytes = sizeof(QueriesShared<T, size>), kKeysBytes = sizeof(KeysShared<T, size>);
      static_assert(kQueriesBytes <= kLeastShared && kKeysBytes <= kLeastShared);
      allow_shared_memory<queries_kernel<T, size>>(kQueriesBytes, device, kOp);
      allow_shared_memory<keys_kernel<T, size>>(kKeysBytes, device, kOp);
      queries_kernel<T, size><<<grid, kThreads, kQueriesBytes, on>>>(backward, constants);
      check_cuda(cudaGetLastError(), kOp, "launch of the backward kernel of queries");
      keys_kernel<T, size><<<grid, kThreads, kKeysBytes, on>>>(backward, constants);
      check_cuda(cudaGetLastError(), kOp, "launch of the backward kernel of keys");
    });
  }
  if (!backward.dm) return;
  const dim3 grid(static_cast<unsigned>(call.sequences.batch), static_cast<unsigned>(call.heads));
  mask_kernel<<<grid, kThreads, 0, on>>>(backward);
  check_cuda(cudaGetLastError(), kOp, "launch of the backward kernel of the mask");
}

}  // namespace distilbert_fast
