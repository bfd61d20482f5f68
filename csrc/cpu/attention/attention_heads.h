// attention on one (sequence, head) pair, all in float32:
//
//     s = q kᵀ     p = 2^((s − max s) c),  c = scale · log2(e)     o = m_h / Σ p · drop(p) v
//
// Keys are packed once as panels [D, 32 keys], values as rows [T, D]: converted, gathered past padding, padded to whole
// vectors. Then 24 queries at a time: packed, their scores written as whole rows (which stay in L1 or L2),
// exponentiated in place, multiplied with the values. q, k, v are read once, o is written once.
//
#pragma once

#include <cmath>

#include "cpu/attention/attention_scratch.h"

namespace distilbert_fast {
namespace {

// One sequence of a call: n tokens that count, and where; after them those that are queries alone.
struct Sequence {
  int64_t index;
  int64_t n;
  int64_t queries;  // n and the others
  const int32_t* tokens;
};

inline Sequence find_tokens(const AttentionSequences& sequences, int64_t index, int32_t* tokens) {
  int64_t n = 0;
  if (sequences.cu_seqlens) {
    const int32_t begin = sequences.cu_seqlens[index], end = sequences.cu_seqlens[index + 1];
    for (int32_t i = begin; i < end; ++i) tokens[n++] = i;
    if (sequences.cu_queries) {
      int64_t queries = n;
      for (int32_t i = sequences.cu_queries[index]; i < sequences.cu_queries[index + 1]; ++i) tokens[queries++] = i;
      return {index, n, queries, tokens};
    }
  } else {
    const bool* mask = sequences.mask ? sequences.mask + index * sequences.length : nullptr;
    for (int64_t i = 0; i < sequences.length; ++i) {
      if (!mask || mask[i]) tokens[n++] = static_cast<int32_t>(i);
    }
  }
  return {index, n, n, tokens};
}

template <class T, class Pointer>
T* head_of(const AttentionTensor<Pointer>& x, int64_t sequence, int64_t head) {
  return static_cast<T*>(x.data) + sequence * x.sequence + head * x.head;
}

// Rows as floats [n, stride], zeros behind column d up to whole panels.
template <class T>
void pack_rows(const T* x, int64_t token_stride, const int32_t* tokens, int64_t n, int64_t d, float* out,
               int64_t stride) {
  constexpr int64_t lanes = Vec::lanes;
  for (int64_t i = 0; i < n; ++i, out += stride) {
    const T* row = x + tokens[i] * token_stride;
    int64_t j = 0;
    for (; j + lanes <= d; j += lanes) store(out + j, load(row + j));
    for (; j < stride; j += lanes) store(out + j, j < d ? load_first(row + j, d - j, 0) : broadcast(0));
  }
}

// Rows as columns of panels [d, 32], zeros behind row n up to a whole panel.
template <class T>
void pack_columns(const T* x, int64_t token_stride, const int32_t* tokens, int64_t n, int64_t d, float* out) {
  constexpr int64_t lanes = Vec::lanes;
  for (int64_t panel = 0; panel < n; panel += kAttentionPanel, out += d * kAttentionPanel) {
    for (int64_t i = 0; i < kAttentionPanel; i += lanes) {
      for (int64_t j = 0; j < d; j += lanes) {
        Vec square[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
          const int64_t token = panel + i + r;
          if (token >= n) {
            square[r] = broadcast(0);
            continue;
          }
          const T* from = x + tokens[token] * token_stride + j;
          square[r] = j + lanes <= d ? load(from) : load_first(from, d - j, 0);
        }
        transpose(square);
        for (int64_t r = 0; r < lanes && j + r < d; ++r) store(out + (j + r) * kAttentionPanel + i, square[r]);
      }
    }
  }
}

// The same two for what a call holds.
inline void pack_rows(const AttentionTensor<const void*>& x, DType dtype, const Sequence& sequence, int64_t head,
                      int64_t first, int64_t n, int64_t d, float* out, int64_t stride) {
  const int32_t* tokens = sequence.tokens + first;
  with_type(dtype, [&](auto type) {
    pack_rows(head_of<const decltype(type)>(x, sequence.index, head), x.token, tokens, n, d, out, stride);
  });
}

inline void pack_columns(const AttentionTensor<const void*>& x, DType dtype, const Sequence& sequence, int64_t head,
                         int64_t d, float* out) {
  with_type(dtype, [&](auto type) {
    pack_columns(head_of<const decltype(type)>(x, sequence.index, head), x.token, sequence.tokens, sequence.n, d, out);
  });
}

// Scores of some queries: q rows [rows, columns], k panels, s [rows, stride].
struct StoreRows {
  float* c;
  int64_t stride;

  void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
    store(c + row * stride + column, low);
    store(c + row * stride + column + Vec::lanes, high);
  }
};

inline void multiply_panels(const float* a, int64_t a_stride, int64_t rows, const float* panels, int64_t n, int64_t d,
                            float* s, int64_t stride) {
  for (int64_t panel = 0; panel < n; panel += kAttentionPanel) {
    matmul({a, a_stride, 1}, rows, panels + panel * d, kAttentionPanel, d, kAttentionPanel,
           StoreRows{s + panel, stride});
  }
}

// s becomes 2^((s − max s) c); their sum.
inline float exponentiate(float* s, int64_t n, float c) {
  constexpr int64_t lanes = Vec::lanes;
  const int64_t whole = n - n % lanes;
  Vec m = broadcast(kLowest), z = broadcast(0);
  for (int64_t j = 0; j < whole; j += lanes) m = maximum(m, load(s + j));
  if (whole < n) m = maximum(m, load_first(s + whole, n - whole, kLowest));
  const Vec top = broadcast(largest(m)), vc = broadcast(c);
  for (int64_t j = 0; j < whole; j += lanes) {
    const Vec e = exp2(mul(sub(load(s + j), top), vc));
    store(s + j, e);
    z = add(z, e);
  }
  if (whole < n) {
    const Vec e = exp2(mul(sub(load_first(s + whole, n - whole, kNone), top), vc));
    store_first(s + whole, e, n - whole);
    z = add(z, e);
  }
  return sum(z);
}

// Dropout: 32 random bits for each (sequence · heads + head, query, key) of a seed, by position, so that backward finds
// them again whatever the order. The first three make 64 bits for a row (the finalizer of splitmix64), whose halves
// enter a hash of the key at its beginning and in its middle (the multipliers of lowbias32).
inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

struct Dropout {
  uint64_t bits;  // of the (sequence, head) pair
  uint32_t threshold;
  float scale;  // 1 / (1 − p)

  Dropout(const AttentionCall& call, int64_t pair)
      : bits(mix(call.seed + static_cast<uint64_t>(pair))),
        threshold(static_cast<uint32_t>(call.dropout_p * 4294967296.0)),
        scale(static_cast<float>(1 / (1 - call.dropout_p))) {}

  // Zeros in a row of a query.
  void drop(float* row, int64_t query, int64_t n) const {
    const uint64_t random = mix(bits + static_cast<uint64_t>(query));
    const uint32_t start = static_cast<uint32_t>(random), middle = static_cast<uint32_t>(random >> 32);
    for (int64_t j = 0; j < n; ++j) {
      uint32_t x = static_cast<uint32_t>(j) + start;
      x = (x ^ x >> 16) * 0x7feb352du ^ middle;
      x = (x ^ x >> 15) * 0x846ca68bu;
      row[j] = (x ^ x >> 16) < threshold ? 0 : row[j];
    }
  }
};

// Where a head's output goes, times a factor for each row.
struct WriteHead {
  void* out;  // of the head
  DType dtype;
  int64_t token_stride;
  const int32_t* tokens;
  const float* factor;
  int64_t d;

  template <class T>
  void write(int64_t row, int64_t column, Vec x) const {
    T* to = static_cast<T*>(out) + tokens[row] * token_stride + column;
    if (column + Vec::lanes <= d) {
      store(to, x);
    } else if (column < d) {
      store_first(to, x, d - column);
    }
  }
  void write(int64_t row, int64_t column, Vec x) const {
    with_type(dtype, [&](auto type) { write<decltype(type)>(row, column, x); });
  }
  void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
    const Vec f = broadcast(factor[row]);
    write(row, column, mul(low, f));
    write(row, column + Vec::lanes, mul(high, f));
  }
};

inline WriteHead writer(const AttentionTensor<void*>& x, DType dtype, int64_t sequence, int64_t head,
                        const int32_t* tokens, const float* factor, int64_t d) {
  void* out = dtype == DType::float32 ? static_cast<void*>(head_of<float>(x, sequence, head))
                                      : static_cast<void*>(head_of<bfloat16>(x, sequence, head));
  return {out, dtype, x.token, tokens, factor, d};
}

// Zeros at padding, or, where the head or no key counts, at every token.
inline void write_zeros(const AttentionCall& call, const AttentionTensor<void*>& x, DType dtype,
                        const Sequence& sequence, int64_t head, bool all) {
  const auto zero = [&](int32_t token) {
    const WriteHead out = writer(x, dtype, sequence.index, head, &token, nullptr, call.head_size);
    for (int64_t j = 0; j < call.head_size; j += Vec::lanes) out.write(0, j, broadcast(0));
  };
  if (all) {
    for (int64_t i = 0; i < sequence.queries; ++i) zero(sequence.tokens[i]);
  }
  if (call.sequences.cu_seqlens || !call.sequences.mask) return;
  const bool* mask = call.sequences.mask + sequence.index * call.sequences.length;
  for (int64_t i = 0; i < call.sequences.length; ++i) {
    if (!mask[i]) zero(static_cast<int32_t>(i));
  }
}

inline float head_mask_of(const AttentionCall& call, int64_t sequence, int64_t head) {
  return call.head_mask ? call.head_mask[sequence * call.head_mask_stride + head] : 1;
}

inline void attention_head(const AttentionForward& forward, const Sequence& sequence, int64_t head, float* memory,
                           const AttentionSizes& sizes) {
  const AttentionCall& call = forward.call;
  const int64_t n = sequence.n, d = call.head_size, columns = sizes.columns;
  const float m = head_mask_of(call, sequence.index, head);
  write_zeros(call, forward.o, forward.o_dtype, sequence, head, m == 0 || n == 0);
  if (m == 0 || n == 0) return;

  float* k = memory;
  float* v = k + sizes.length * columns;
  float* q = v + sizes.length * columns;
  float* s = q + kAttentionQueries * columns;
  float* factor = s + kAttentionQueries * sizes.scores;
  pack_columns(call.k, call.dtype, sequence, head, d, k);
  pack_rows(call.v, call.dtype, sequence, head, 0, n, d, v, columns);
  const float c = static_cast<float>(kLog2e * call.scale);
  const Dropout dropout(call, sequence.index * call.heads + head);
  for (int64_t first = 0; first < sequence.queries; first += kAttentionQueries) {
    const int64_t rows = smaller(kAttentionQueries, sequence.queries - first);
    pack_rows(call.q, call.dtype, sequence, head, first, rows, d, q, columns);
    multiply_panels(q, columns, rows, k, n, d, s, sizes.scores);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s + r * sizes.scores;
      factor[r] = m * dropout.scale / exponentiate(row, n, c);
      if (dropout.threshold > 0) dropout.drop(row, first + r, n);
    }
    const WriteHead out = writer(forward.o, forward.o_dtype, sequence.index, head, sequence.tokens + first, factor, d);
    const int64_t width = (d + kMatmulColumns - 1) / kMatmulColumns * kMatmulColumns;
    matmul({s, sizes.scores, 1}, rows, v, columns, n, width, out);
  }
}

inline void attention_forward(const AttentionForward& forward, int64_t begin, int64_t end, void* scratch) {
  const AttentionCall& call = forward.call;
  int32_t* tokens = static_cast<int32_t*>(scratch);
  for (int64_t pair = begin; pair < end; ++pair) {
    const Sequence sequence = find_tokens(call.sequences, pair / call.heads, tokens);
    const AttentionSizes sizes(sequence.queries, call.head_size);
    attention_head(forward, sequence, pair % call.heads, static_cast<float*>(scratch) + sizes.tokens, sizes);
  }
}

}  // namespace
}  // namespace distilbert_fast
