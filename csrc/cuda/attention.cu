// attention forward:   s = q kᵀ     p = 2^((s − max s) c),  c = scale · log2(e)     o = m_h / Σ p · drop(p) v
//
// One block takes 64 or 128 queries of one head and runs once through the keys and values of their sequence, 64 at a
// time: while it computes with one tile, the next is on its way. Maxima and sums grow with the tiles, and what was
// added before is scaled down (Dao: FlashAttention-2, arXiv:2307.08691). q, k, v are read in place, whatever their
// strides; o is written once, and for backward m, Σ p and, if the gradient of m_h is wanted, o before m_h. A head of
// mask 0, unless that gradient is wanted, and tiles of padding cost nothing.
#include "attention.cuh"

namespace distilbert_fast {
namespace {

// Tiles of 16 queries a warp has: with two, keys and values are read half as often from shared memory; with more than
// 64 columns registers do not suffice.
template <int size>
constexpr int kTiles = size <= 64 ? 2 : 1;

template <int size>
constexpr int kQueries = kTiles<size> * kTokens;

template <class T, int size>
struct ForwardShared {
  T q[kQueries<size> * size];
  T k[2][kTokens * size], v[2][kTokens * size];
  uint64_t random[kQueries<size>];  // of the dropout
  int rank[2][kTokens];             // of the keys, for the dropout
};

// Of some queries, each with four lanes: the maximum and, lane by lane, the sum, as far as keys have been seen.
template <int tiles>
struct Softmax {
  float m[tiles][2], z[tiles][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      m[t][0] = m[t][1] = -INFINITY;
      z[t][0] = z[t][1] = 0;
    }
  }

  // s becomes p; what has been added to o is put in proportion.
  template <int keys, int columns>
  __device__ __forceinline__ void add(float (&s)[tiles][keys][4], float (&o)[tiles][columns][4], float c) {
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = fmaxf(s[t][0][2 * i], s[t][0][2 * i + 1]);
#pragma unroll
        for (int n = 1; n < keys; ++n) top = fmaxf(top, fmaxf(s[t][n][2 * i], s[t][n][2 * i + 1]));
        top = fmaxf(m[t][i], reduce_row(top, Maximum()));
        const float factor = ex2((m[t][i] - top) * c);
        m[t][i] = top;
        z[t][i] *= factor;
#pragma unroll
        for (int n = 0; n < columns; ++n) {
          o[t][n][2 * i] *= factor;
          o[t][n][2 * i + 1] *= factor;
        }
#pragma unroll
        for (int n = 0; n < keys; ++n) {
          s[t][n][2 * i] = ex2((s[t][n][2 * i] - top) * c);
          s[t][n][2 * i + 1] = ex2((s[t][n][2 * i + 1] - top) * c);
          z[t][i] += s[t][n][2 * i] + s[t][n][2 * i + 1];
        }
      }
    }
  }
};

template <class T, int size>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const AttentionForward forward, const Constants constants) {
  constexpr int tiles = kTiles<size>;
  const AttentionCall& call = forward.call;
  const Rows block = rows_of<kQueries<size>>(call.sequences, blockIdx.x);
  if (block.count == 0) return;
  const Sequence& sequence = block.sequence;
  const int first = block.first, head = blockIdx.y, head_size = static_cast<int>(call.head_size);
  const Tokens low = tokens_at(sequence, first, call.seed), high = tokens_after(sequence, low);  // the queries
  T* o = head_of<T>(forward.o, sequence, head) + first * forward.o.token;
  const float mask = head_mask_of(call, sequence.index, head);
  if ((mask == 0 && !call.every_head) || (low.counted == 0 && (tiles == 1 || high.counted == 0))) {
    store_zeros(o, forward.o.token, block.count, head_size);
    return;
  }

  auto& shared = *reinterpret_cast<ForwardShared<T, size>*>(shared_memory());
  const T* q = head_of<const T>(call.q, sequence, head) + first * call.q.token;
  const T* k = head_of<const T>(call.k, sequence, head);
  const T* v = head_of<const T>(call.v, sequence, head);
  const int thread = static_cast<int>(threadIdx.x);
  const auto load_keys = [&](const Tokens& keys, int stage) {
    load_tile<size>(shared.k[stage], k + keys.first * call.k.token, call.k.token, keys.counted, head_size,
                    constants.aligned);
    load_tile<size>(shared.v[stage], v + keys.first * call.v.token, call.v.token, keys.counted, head_size,
                    constants.aligned);
    if (call.seed && thread < kTokens) shared.rank[stage][thread] = keys.rank_of(thread);
  };
  load_tile<size>(shared.q, q, call.q.token, low.counted, head_size, constants.aligned);
  if (tiles > 1) {
    load_tile<size>(shared.q + kTokens * size, q + kTokens * call.q.token, call.q.token, high.counted, head_size,
                    constants.aligned);
  }
  Tokens keys = next_tokens(sequence);
  load_keys(keys, 0);
  cp_async_commit();
  const Dropout dropout(call, constants, sequence.index, head);
  if (call.seed && thread < kQueries<size>) {
    shared.random[thread] = dropout.of_query((thread < kTokens ? low : high).rank_of(thread % kTokens));
  }

  const int row = warp_index() * 16 * tiles, lane = lane_index();  // the warp's first row of the block
  const float c = constants.c;
  Softmax<tiles> softmax;
  float sum[tiles][size / 8][4] = {};
  for (int stage = 0; keys.counted; stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody needs the one before
    const Tokens next = next_tokens(sequence, keys);
    if (next.counted) load_keys(next, stage ^ 1);
    cp_async_commit();
    if (first + row < sequence.length) {
      float s[tiles][kTokens / 8][4];
      multiply_transposed<size>(s, shared.q, row, shared.k[stage]);
      if (keys.counted != kAll) hide(s, keys.counted);
      softmax.add(s, sum, c);
      if (call.seed) {
        each(s, [&](float& x, int r, int key) {
          if (dropout.drops(shared.random[row + r], shared.rank[stage][key])) x = 0;
        });
      }
      multiply_add<size>(sum, s, shared.v[stage]);
    }
    keys = next;
  }

  const uint64_t queries = counted(sequence, first + row / kTokens * kTokens);
  float factor[tiles][2], masked_factor[tiles][2];
#pragma unroll
  for (int t = 0; t < tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float z = reduce_row(softmax.z[t][i], Sum());
      const int r = row + 16 * t + lane / 4 + 8 * i;
      const bool counts = queries >> (r % kTokens) & 1;
      factor[t][i] = counts ? constants.kept / z : 0;
      masked_factor[t][i] = mask == 0 ? 0 : mask * factor[t][i];
      if (forward.stats && counts && lane % 4 == 0) {
        const float m = softmax.m[t][i] * c;  // rounded: so the sum is made to fit it
        float* stats = row_of(forward.stats, call, sequence, head) + first + r;
        stats[0] = m;
        stats[call.heads * all_tokens(call.sequences)] = 1 / (z * ex2(fmaf(softmax.m[t][i], c, -m)));
      }
    }
  }
  T* staging = shared.q + row * size;
  store_rows<size>(sum, masked_factor, staging, o + row * forward.o.token, forward.o.token,
                   sequence.length - first - row, head_size, constants.aligned);
  if (!forward.unmasked.data) return;
  T* unmasked = head_of<T>(forward.unmasked, sequence, head) + (first + row) * forward.unmasked.token;
  store_rows<size>(sum, factor, staging, unmasked, forward.unmasked.token, sequence.length - first - row, head_size,
                   constants.aligned);
}

}  // namespace

void attention_forward(const AttentionForward& forward, int device, void* stream) {
  const AttentionCall& call = forward.call;
  check(call);
  if (!any_token(call)) return;
  require(forward.o.data, kOp, "o must point to memory", "null");
  const bool aligned = call.head_size % 8 == 0 && in_sixteens(call.q) && in_sixteens(call.k) && in_sixteens(call.v) &&
                       in_sixteens(forward.o) && in_sixteens(forward.unmasked);
  const DeviceGuard guard(device, kOp);
  with_head(call, [&](auto x, auto size) {
    using T = decltype(x);
    constexpr int kBytes = sizeof(ForwardShared<T, size>);
    static_assert(kBytes <= kLeastShared);
    allow_shared_memory<forward_kernel<T, size>>(kBytes, device, kOp);
    forward_kernel<T, size><<<grid_of(call, kQueries<size>), kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(
        forward, Constants(call, aligned));
  });
  check_cuda(cudaGetLastError(), kOp, "launch of the forward kernel");
}

}  // namespace distilbert_fast
