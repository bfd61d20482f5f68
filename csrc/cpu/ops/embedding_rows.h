// embedding on one token:   h = word[id] + position[position id] (+ token_type[token type id]),   y = LayerNorm(h).
//
// The rows of the tables are read where they lie, and everything after that is layer_norm's, forward and backward
// (which gives dh; its rows are added to those of the tables elsewhere).
#pragma once

namespace distilbert_fast {
namespace {

inline const void* looked_up(const Lookup& lookup, int64_t r) {
  if (!lookup.table) return nullptr;
  const int64_t id =
      lookup.wide ? static_cast<const int64_t*>(lookup.ids)[r] : static_cast<const int32_t*>(lookup.ids)[r];
  return row_at(lookup.table, lookup.dtype, id * lookup.stride);
}

inline AddRows add_rows_of(const Lookup (&lookups)[3]) {
  return add_rows_of(lookups[0].dtype, type_of(lookups[1].table, lookups[1].dtype),
                     type_of(lookups[2].table, lookups[2].dtype));
}

inline void embedding_forward(const EmbeddingRows& call, int64_t begin, int64_t end) {
  const auto terms_of = [&](int64_t r, const void* terms[3]) {
    for (int k = 0; k < 3; ++k) terms[k] = looked_up(call.lookups[k], r);
  };
  normalize_rows(add_rows_of(call.lookups), terms_of, call.out, begin, end);
}

inline void add_coded_rows(const CodedRows& call, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vec::lanes;
  const int terms = call.lookups[2].codes == nullptr ? 2 : 3;
  for (int64_t r = begin; r < end; ++r) {
    const int8_t* codes[3];
    Vec scale[3];
    for (int k = 0; k < terms; ++k) {
      const int64_t id = call.lookups[k].ids[r];
      codes[k] = call.lookups[k].codes + id * call.columns;
      scale[k] = broadcast(call.lookups[k].scale[id]);
    }
    float* out = call.out + r * call.out_stride;
    const auto sum_at = [&](int64_t c, const auto& load_codes) {
      Vec x = mul(load_codes(codes[0] + c), scale[0]);
      for (int k = 1; k < terms; ++k) x = fma(load_codes(codes[k] + c), scale[k], x);
      return x;
    };
    int64_t c = 0;
    for (; c + lanes <= call.columns; c += lanes) {
      store(out + c, sum_at(c, [](const int8_t* p) { return from_int8(p); }));
    }
    if (c < call.columns) {
      const int64_t n = call.columns - c;
      const auto load_codes = [n](const int8_t* p) {
        int8_t part[lanes] = {};
        for (int64_t i = 0; i < n; ++i) part[i] = p[i];
        return from_int8(part);
      };
      store_first(out + c, sum_at(c, load_codes), n);
    }
  }
}

inline void embedding_backward(const EmbeddingGradientRows& call, int64_t begin, int64_t end) {
  const AddRows add_rows = add_rows_of(call.lookups);
  const DifferentiateRow differentiate_row = differentiate_row_of(call.gradient);
  for (int64_t r = begin; r < end; ++r) {
    const void* const rows[3] = {looked_up(call.lookups[0], r), looked_up(call.lookups[1], r),
                                 looked_up(call.lookups[2], r)};
    differentiate_row(add_rows, rows, call.gradient, r);
  }
}

}  // namespace
}  // namespace distilbert_fast
