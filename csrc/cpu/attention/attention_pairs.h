// attention on one (sequence, head) pair of bfloat16, its products by pairs of bfloat16 with float32 sums:
//
//     s = q kᵀ     p = 2^((s − max s) c),  c = scale · log2(e)     o = m_h / Σ p · drop(p) v
//
// p is rounded to bfloat16 once, as the left side of a product; its sum is taken before. Keys and values are packed as
// the weights of a linear layer are (gemm.h): keys as panels of 32 keys over D, values as panels of 32 columns over the
// keys. Then 32 queries at a time: copied, their scores written as float rows, exponentiated, narrowed in place.
//
// Product::multiply(a, a_stride, rows, panel, blocks, out, out_stride) gives a [rows, K] · panel; it may read and write
// rows behind the last one, up to kPairQueries. For tiers with AVX-512.
#pragma once

#include "cpu/gemm/gemm_pack_pairs.h"

namespace distilbert_fast {
namespace {

// Rows [n, stride bytes] with zeros behind column d up to whole blocks.
inline void pack_pair_rows(const bfloat16* x, int64_t token_stride, const int32_t* tokens, int64_t n, int64_t d,
                           uint8_t* out, int64_t stride) {
  for (int64_t i = 0; i < n; ++i, out += stride) {
    const bfloat16* row = x + tokens[i] * token_stride;
    for (int64_t j = 0; j < d; j += kPairBlock) _mm512_storeu_si512(out + 2 * j, load_pairs(row + j, d - j));
  }
}

// n keys of d numbers as panels of 32 keys.
inline void pack_pair_keys(const bfloat16* x, int64_t token_stride, const int32_t* tokens, int64_t n, int64_t d,
                           uint8_t* out) {
  for (int64_t panel = 0; panel < n; panel += kPanelColumns) {
    for (int64_t j = 0; j < d; j += kPairBlock) {
      for (int64_t half = 0; half < kPanelColumns; half += 16, out += kHalfBytes) {
        const auto pairs = [&](int64_t i) {
          const int64_t key = panel + half + i;
          return key < n ? load_pairs(x + tokens[key] * token_stride + j, d - j) : _mm512_setzero_si512();
        };
        pack_touching_half(pairs, out);
      }
    }
  }
}

// n values of d numbers as panels of 32 columns.
inline void pack_pair_values(const bfloat16* x, int64_t token_stride, const int32_t* tokens, int64_t n, int64_t d,
                             uint8_t* out) {
  for (int64_t panel = 0; panel < d; panel += kPanelColumns) {
    for (int64_t block = 0; block < n; block += kPairBlock) {
      for (int64_t column = panel; column < panel + kPanelColumns; column += 16, out += kHalfBytes) {
        const auto halves = [&](int64_t i) {
          const int64_t key = block + i;
          return key < n ? load_halves(x + tokens[key] * token_stride + column, d - column) : _mm512_setzero_si512();
        };
        pack_crossing_half(halves, out);
      }
    }
  }
}

// A row of floats becomes the same row of bfloat16 at its own beginning, with zeros up to a whole block.
inline void narrow_row(float* s, int64_t n) {
  bfloat16* out = reinterpret_cast<bfloat16*>(s);
  const int64_t end = pair_blocks(n) * kPairBlock;
  for (int64_t j = 0; j < end; j += 16) {
    const Vec x = j + 16 <= n ? load(s + j) : j < n ? load_first(s + j, n - j, 0) : broadcast(0);
    store(out + j, x);
  }
}

template <class Product>
void attention_pair_head(const AttentionForward& forward, const Sequence& sequence, int64_t head, uint8_t* memory,
                         const AttentionSizes& sizes) {
  const AttentionCall& call = forward.call;
  const int64_t n = sequence.n, d = call.head_size;
  const float m = head_mask_of(call, sequence.index, head);
  write_zeros(call, forward.o, forward.o_dtype, sequence, head, m == 0 || n == 0);
  if (m == 0 || n == 0) return;

  const int64_t key_blocks = pair_blocks(d), value_blocks = pair_blocks(n), q_stride = sizes.columns * 2;
  uint8_t* k = memory;
  uint8_t* v = k + sizes.length * sizes.columns * 2;
  uint8_t* q = v + sizes.length * sizes.columns * 2;
  float* s = reinterpret_cast<float*>(q + kPairQueries * q_stride);
  float* o = s + kPairQueries * sizes.scores;
  float* factor = o + kPairQueries * kPanelColumns;
  const auto part = [&](const AttentionTensor<const void*>& x) {
    return head_of<const bfloat16>(x, sequence.index, head);
  };
  pack_pair_keys(part(call.k), call.k.token, sequence.tokens, n, d, k);
  pack_pair_values(part(call.v), call.v.token, sequence.tokens, n, d, v);
  const float c = static_cast<float>(kLog2e * call.scale);
  const Dropout dropout(call, sequence.index * call.heads + head);
  for (int64_t first = 0; first < sequence.queries; first += kPairQueries) {
    const int64_t rows = smaller(kPairQueries, sequence.queries - first);
    pack_pair_rows(part(call.q), call.q.token, sequence.tokens + first, rows, d, q, q_stride);
    for (int64_t panel = 0; panel < n; panel += kPanelColumns) {
      Product::multiply(q, q_stride, rows, k + panel / kPanelColumns * key_blocks * kBlockBytes, key_blocks, s + panel,
                        sizes.scores);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s + r * sizes.scores;
      factor[r] = m * dropout.scale / exponentiate(row, n, c);
      if (dropout.threshold > 0) dropout.drop(row, first + r, n);
      narrow_row(row, n);
    }
    const WriteHead out = writer(forward.o, forward.o_dtype, sequence.index, head, sequence.tokens + first, factor, d);
    for (int64_t panel = 0; panel < d; panel += kPanelColumns) {
      Product::multiply(reinterpret_cast<const uint8_t*>(s), sizes.scores * 4, rows,
                        v + panel / kPanelColumns * value_blocks * kBlockBytes, value_blocks, o, kPanelColumns);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = o + r * kPanelColumns;
        out(r, panel, load(from), load(from + Vec::lanes));
      }
    }
  }
}

template <class Product>
void attention_pairs_forward(const AttentionForward& forward, int64_t begin, int64_t end, void* scratch) {
  const AttentionCall& call = forward.call;
  if (call.dtype != DType::bfloat16) return attention_forward(forward, begin, end, scratch);
  int32_t* tokens = static_cast<int32_t*>(scratch);
  Product::begin();
  for (int64_t pair = begin; pair < end; ++pair) {
    const Sequence sequence = find_tokens(call.sequences, pair / call.heads, tokens);
    const AttentionSizes sizes(sequence.queries, call.head_size);
    attention_pair_head<Product>(forward, sequence, pair % call.heads,
                                 static_cast<uint8_t*>(scratch) + sizes.tokens * 4, sizes);
  }
  Product::end();
}

}  // namespace
}  // namespace distilbert_fast
