// Gradients of attention on one (sequence, head) pair, all in float32; g = d loss / d o, drop as in forward:
//
//     p = softmax(scale · q kᵀ)     dp = drop(g vᵀ)     r = Σ_keys p ∘ dp     ds = p ∘ (dp − r)
//     dv = m_h · drop(p)ᵀ g         dq = m_h · scale · ds k         dk = m_h · scale · dsᵀ q         dm_h = Σ_queries r
//
// Keys are packed as rows and as panels, values as panels. Then some queries at a time, with their g: the probabilities
// are computed again, ds is written over dp, dq goes out; dk and dv grow in memory of the pair's own, query block by
// query block in order, and go out at the end.
#pragma once

namespace distilbert_fast {
namespace {

// The sums begin with what is there.
struct LoadRows {
  const float* c;
  int64_t stride;

  void operator()(int64_t row, int64_t column, Vec& low, Vec& high) const {
    low = load(c + row * stride + column);
    high = load(c + row * stride + column + Vec::lanes);
  }
};

// e, not yet divided by its sum, becomes p = e / sum, and dp becomes p (z dp − r); returns r = Σ p z dp.
inline float score_gradient(float* e, float* dp, int64_t n, float one_over_sum, float z) {
  constexpr int64_t lanes = Vec::lanes;
  const int64_t whole = n - n % lanes;
  Vec total = broadcast(0);
  for (int64_t j = 0; j < whole; j += lanes) total = fma(load(e + j), load(dp + j), total);
  if (whole < n) total = fma(load_first(e + whole, n - whole, 0), load_first(dp + whole, n - whole, 0), total);
  const float r = sum(total) * one_over_sum * z;
  const Vec vr = broadcast(r), vz = broadcast(z), inverse = broadcast(one_over_sum);
  const auto gradient = [&](Vec p, Vec g) { return mul(p, sub(mul(g, vz), vr)); };
  for (int64_t j = 0; j < whole; j += lanes) {
    const Vec p = mul(load(e + j), inverse);
    store(dp + j, gradient(p, load(dp + j)));
    store(e + j, p);
  }
  if (whole < n) {
    const Vec p = mul(load_first(e + whole, n - whole, 0), inverse);
    store_first(dp + whole, gradient(p, load_first(dp + whole, n - whole, 0)), n - whole);
    store_first(e + whole, p, n - whole);
  }
  return r;
}

inline void clear(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::lanes) store(x + i, broadcast(0));
}

// All rows times one factor.
inline void write_rows(const float* x, int64_t stride, int64_t n, float factor, const WriteHead& out) {
  for (int64_t i = 0; i < n; ++i, x += stride) {
    for (int64_t j = 0; j < out.d; j += Vec::lanes) out.write(i, j, mul(load(x + j), broadcast(factor)));
  }
}

inline void attention_head_gradient(const AttentionBackward& backward, const Sequence& sequence, int64_t head,
                                    float* memory, const AttentionSizes& sizes) {
  const AttentionCall& call = backward.call;
  const int64_t n = sequence.n, d = call.head_size, columns = sizes.columns, matrix = sizes.length * columns;
  const float m = head_mask_of(call, sequence.index, head);
  write_zeros(call, backward.dq, call.dtype, sequence, head, m == 0);
  write_zeros(call, backward.dk, call.dtype, sequence, head, m == 0);
  write_zeros(call, backward.dv, call.dtype, sequence, head, m == 0);
  float* dm = backward.dm ? backward.dm + sequence.index * call.heads + head : nullptr;
  if (n == 0 || (m == 0 && !dm)) return;

  float* key_columns = memory;
  float* value_columns = key_columns + matrix;
  float* keys = value_columns + matrix;
  float* dk = keys + matrix;
  float* dv = dk + matrix;
  float* q = dv + matrix;
  float* g = q + kAttentionQueries * columns;
  float* p = g + kAttentionQueries * columns;
  float* ds = p + kAttentionQueries * sizes.scores;
  float factor[kAttentionQueries];
  for (float& x : factor) x = m * static_cast<float>(call.scale);

  pack_columns(call.k, call.dtype, sequence, head, d, key_columns);
  pack_columns(call.v, call.dtype, sequence, head, d, value_columns);
  pack_rows(call.k, call.dtype, sequence, head, 0, n, d, keys, columns);
  clear(dk, n * columns);
  clear(dv, n * columns);
  const float c = static_cast<float>(kLog2e * call.scale);
  const Dropout dropout(call, sequence.index * call.heads + head);
  const int64_t width = (d + kMatmulColumns - 1) / kMatmulColumns * kMatmulColumns;
  double total = 0;
  for (int64_t first = 0; first < n; first += kAttentionQueries) {
    const int64_t rows = smaller(kAttentionQueries, n - first);
    pack_rows(call.q, call.dtype, sequence, head, first, rows, d, q, columns);
    pack_rows(backward.g, call.dtype, sequence, head, first, rows, d, g, columns);
    multiply_panels(q, columns, rows, key_columns, n, d, p, sizes.scores);
    multiply_panels(g, columns, rows, value_columns, n, d, ds, sizes.scores);
    for (int64_t r = 0; r < rows; ++r) {
      float *p_row = p + r * sizes.scores, *ds_row = ds + r * sizes.scores;
      const float one_over_sum = 1 / exponentiate(p_row, n, c);
      if (dropout.threshold > 0) dropout.drop(ds_row, first + r, n);
      total += score_gradient(p_row, ds_row, n, one_over_sum, dropout.scale);
      if (dropout.threshold > 0) dropout.drop(p_row, first + r, n);
    }
    if (m == 0) continue;
    const int32_t* tokens = sequence.tokens + first;
    matmul({ds, sizes.scores, 1}, rows, keys, columns, n, width,
           writer(backward.dq, call.dtype, sequence.index, head, tokens, factor, d));
    matmul({ds, 1, sizes.scores}, n, q, columns, rows, width, StoreRows{dk, columns}, LoadRows{dk, columns});
    matmul({p, 1, sizes.scores}, n, g, columns, rows, width, StoreRows{dv, columns}, LoadRows{dv, columns});
  }
  if (dm) *dm = static_cast<float>(total);
  if (m == 0) return;
  const int32_t* tokens = sequence.tokens;
  write_rows(dk, columns, n, m * static_cast<float>(call.scale),
             writer(backward.dk, call.dtype, sequence.index, head, tokens, nullptr, d));
  write_rows(dv, columns, n, m * dropout.scale,
             writer(backward.dv, call.dtype, sequence.index, head, tokens, nullptr, d));
}

inline void attention_backward(const AttentionBackward& backward, int64_t begin, int64_t end, void* scratch) {
  const AttentionCall& call = backward.call;
  int32_t* tokens = static_cast<int32_t*>(scratch);
  for (int64_t pair = begin; pair < end; ++pair) {
    const Sequence sequence = find_tokens(call.sequences, pair / call.heads, tokens);
    const AttentionSizes sizes(sequence.n, call.head_size);
    attention_head_gradient(backward, sequence, pair % call.heads, static_cast<float*>(scratch) + sizes.tokens, sizes);
  }
}

}  // namespace
}  // namespace distilbert_fast
