// LayerNorm of one row h, the sum of up to three rows:   y = (h − μ) rstd w + b,   rstd = 1 / √(mean (h − μ)² + ε).
//
// Pass 1 makes h in float32 and its mean m. Pass 2 adds d = h − m and d²: m was rounded, and the mean of d is what it
// lacks, so μ = m + mean d and the variance mean d² − (mean d)² keep their digits under any offset. Pass 3 writes y
// over h; pass 4 writes what is wanted besides, codes by the scale that pass 3 found, and a rounded y.
//
// h and y live in y itself where that is float32, else on the stack, in L1 either way. A longer row than the stack
// holds is made again, chunk by chunk, in every pass. Sums of chunks are added in double. A few rows go through each
// pass one after another, so that what a row's sums end in is computed during the next row.
#pragma once

namespace distilbert_fast {
namespace {

constexpr int64_t kChunk = 4096;  // columns
constexpr int64_t kGroup = 4;     // rows in each pass
constexpr int kSums = 4;          // independent sums, so that none waits for its own last addition

struct None {};  // the type of a row that is not there
template <class T>
constexpr bool kPresent = true;
template <>
constexpr bool kPresent<None> = false;

// h = a + b + c over columns [begin, begin + n) of three rows; returns the sum of h.
template <class A, class B, class C>
float add_rows(const void* const terms[3], int64_t begin, int64_t n, float* h) {
  constexpr int64_t lanes = Vec::lanes;
  const A* a = static_cast<const A*>(terms[0]) + begin;
  const auto with = [&](int64_t i, auto&& load_from) {
    Vec x = load_from(a + i);
    if constexpr (kPresent<B>) x = add(x, load_from(static_cast<const B*>(terms[1]) + begin + i));
    if constexpr (kPresent<C>) x = add(x, load_from(static_cast<const C*>(terms[2]) + begin + i));
    return x;
  };
  const auto at = [&](int64_t i) { return with(i, [](auto* p) { return load(p); }); };
  Vec sums[kSums] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
  int64_t i = 0;
  for (; i + kSums * lanes <= n; i += kSums * lanes) {
    for (int k = 0; k < kSums; ++k) {
      const Vec x = at(i + k * lanes);
      store(h + i + k * lanes, x);
      sums[k] = add(sums[k], x);
    }
  }
  for (; i + lanes <= n; i += lanes) {
    const Vec x = at(i);
    store(h + i, x);
    sums[0] = add(sums[0], x);
  }
  if (i < n) {
    const Vec x = with(i, [&](auto* p) { return load_first(p, n - i, 0); });
    store_first(h + i, x, n - i);
    sums[1] = add(sums[1], x);
  }
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

using AddRows = float (*)(const void* const terms[3], int64_t begin, int64_t n, float* h);

// Of types: 0 float32, 1 bfloat16, 2 none.
inline AddRows add_rows_of(DType a, int b, int c) {
  using F = float;
  using L = bfloat16;
  static constexpr AddRows instances[2][3][3] = {
      {{add_rows<F, F, F>, add_rows<F, F, L>, add_rows<F, F, None>},
       {add_rows<F, L, F>, add_rows<F, L, L>, add_rows<F, L, None>},
       {add_rows<F, None, F>, add_rows<F, None, L>, add_rows<F, None, None>}},
      {{add_rows<L, F, F>, add_rows<L, F, L>, add_rows<L, F, None>},
       {add_rows<L, L, F>, add_rows<L, L, L>, add_rows<L, L, None>},
       {add_rows<L, None, F>, add_rows<L, None, L>, add_rows<L, None, None>}}};
  return instances[static_cast<int>(a)][b][c];
}

inline int type_of(const void* rows, DType dtype) { return rows ? static_cast<int>(dtype) : 2; }

inline const void* row_at(const void* rows, DType dtype, int64_t element) {
  return static_cast<const char*>(rows) + element * (dtype == DType::float32 ? 4 : 2);
}

// Adds Σ d and Σ d², d = h − m, to the two sums.
inline void add_spread(const float* h, int64_t n, float m, double& sum_d, double& sum_dd) {
  constexpr int64_t lanes = Vec::lanes;
  const Vec vm = broadcast(m);
  Vec sums[kSums] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
  Vec squares[kSums] = {broadcast(0), broadcast(0), broadcast(0), broadcast(0)};
  const auto take = [&](int k, Vec x) {
    const Vec d = sub(x, vm);
    sums[k] = add(sums[k], d);
    squares[k] = fma(d, d, squares[k]);
  };
  int64_t i = 0;
  for (; i + kSums * lanes <= n; i += kSums * lanes) {
    for (int k = 0; k < kSums; ++k) take(k, load(h + i + k * lanes));
  }
  for (; i + lanes <= n; i += lanes) take(0, load(h + i));
  if (i < n) take(1, load_first(h + i, n - i, m));
  sum_d += sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  sum_dd += sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
}

// y = ((h − m) rstd + shift) w + b in place; returns the larger of `largest` and max |y|.
inline Vec normalize(float* h, const float* w, const float* b, int64_t n, float m, float rstd, float shift,
                     Vec largest) {
  constexpr int64_t lanes = Vec::lanes;
  const Vec vm = broadcast(m), vr = broadcast(rstd), vs = broadcast(shift);
  const auto y_of = [&](Vec x, Vec weight, Vec bias) { return fma(fma(sub(x, vm), vr, vs), weight, bias); };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const Vec y = y_of(load(h + i), load(w + i), load(b + i));
    store(h + i, y);
    largest = larger_magnitude(largest, y);
  }
  if (i < n) {
    const Vec y = y_of(load_first(h + i, n - i, m), load_first(w + i, n - i, 0), load_first(b + i, n - i, 0));
    store_first(h + i, y, n - i);
    largest = larger_magnitude(largest, y);
  }
  return largest;
}

inline void round_row(const float* y, int64_t n, bfloat16* out) {
  constexpr int64_t lanes = Vec::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(out + i, load(y + i));
  if (i < n) store_first(out + i, load_first(y + i, n - i, 0), n - i);
}

struct NormalizedRow {
  const void* terms[3];  // h is their sum
  float* kept;           // h, then y
  float m, rstd, shift;
  Vec largest;  // max |y| of each lane
};

// Rows [begin, end) of a call, few enough for the stack. terms_of(r, terms) tells what row r is the sum of.
template <class TermsOf>
void normalize_group(AddRows add_rows, const TermsOf& terms_of, const Normalized& out, int64_t begin, int64_t end) {
  alignas(64) float stack[kChunk];
  NormalizedRow rows[kGroup];
  const int64_t columns = out.columns;
  const bool in_place = out.y && out.y_dtype == DType::float32;
  const bool whole = in_place || columns <= kChunk;
  const auto each_row = [&](auto&& pass) {
    for (int64_t r = begin; r < end; ++r) pass(rows[r - begin], r);
  };
  const auto each_chunk = [&](const NormalizedRow& row, auto&& pass) {
    for (int64_t c = 0; c < columns; c += kChunk) pass(row.kept + (whole ? c : 0), c, smaller(kChunk, columns - c));
  };
  const auto make_y = [&](NormalizedRow& row, float* h, int64_t c, int64_t n) {
    row.largest = normalize(h, out.weight + c, out.bias + c, n, row.m, row.rstd, row.shift, row.largest);
  };

  each_row([&](NormalizedRow& row, int64_t r) {
    terms_of(r, row.terms);
    row.kept = in_place ? static_cast<float*>(out.y) + r * out.y_stride : stack + (r - begin) * columns;
    double total = 0;
    each_chunk(row, [&](float* h, int64_t c, int64_t n) { total += add_rows(row.terms, c, n, h); });
    row.m = static_cast<float>(total / columns);
  });

  each_row([&](NormalizedRow& row, int64_t r) {
    double sum_d = 0, sum_dd = 0;
    each_chunk(row, [&](float* h, int64_t c, int64_t n) {
      if (!whole) add_rows(row.terms, c, n, h);
      add_spread(h, n, row.m, sum_d, sum_dd);
    });
    const double mean_d = sum_d / columns, variance = sum_dd / columns - mean_d * mean_d;
    const double rstd = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + out.eps);
    if (out.mean) out.mean[r] = static_cast<float>(row.m + mean_d);
    if (out.rstd) out.rstd[r] = static_cast<float>(rstd);
    row.rstd = static_cast<float>(rstd);
    row.shift = static_cast<float>(-mean_d * rstd);
  });

  const Codes& codes = out.codes;
  const bool coded = codes.data || codes.scale_out;  // a row of no columns has no codes, but a scale
  const bool find_scale = coded && !codes.scale_in;
  each_row([&](NormalizedRow& row, int64_t) {
    row.largest = broadcast(0);
    if (!whole && !find_scale) return;
    each_chunk(row, [&](float* h, int64_t c, int64_t n) {
      if (!whole) add_rows(row.terms, c, n, h);
      make_y(row, h, c, n);
    });
  });

  each_row([&](NormalizedRow& row, int64_t r) {
    float scale = 0;
    if (coded) {
      scale = find_scale ? scale_of(largest_magnitude(row.largest)) : codes.scale_in[r * codes.scale_in_stride];
      if (codes.scale_out) codes.scale_out[r] = scale;
    }
    const float inverse = inverse_of(scale);
    const auto write = find_scale ? write_own_codes<float> : write_codes<float>;
    each_chunk(row, [&](float* y, int64_t c, int64_t n) {
      if (!whole) add_rows(row.terms, c, n, y), make_y(row, y, c, n);
      if (codes.data) write(y, n, inverse, codes.data + r * codes.stride + c, codes.flip);
      if (out.y && !in_place) round_row(y, n, static_cast<bfloat16*>(out.y) + r * out.y_stride + c);
      if (out.y_low) round_row(y, n, out.y_low + r * out.y_low_stride + c);
    });
  });
}

template <class TermsOf>
void normalize_rows(AddRows add_rows, const TermsOf& terms_of, const Normalized& out, int64_t begin, int64_t end) {
  const int64_t group = kGroup * out.columns <= kChunk ? kGroup : 1;
  for (int64_t r = begin; r < end; r += group) {
    normalize_group(add_rows, terms_of, out, r, smaller(r + group, end));
  }
}

inline void layer_norm_forward(const LayerNormRows& call, int64_t begin, int64_t end) {
  const auto terms_of = [&](int64_t r, const void* terms[3]) {
    terms[0] = row_at(call.x, call.x_dtype, r * call.x_stride);
    terms[1] = call.residual ? row_at(call.residual, call.residual_dtype, r * call.residual_stride) : nullptr;
    terms[2] = nullptr;
  };
  const AddRows add_rows = add_rows_of(call.x_dtype, type_of(call.residual, call.residual_dtype), 2);
  normalize_rows(add_rows, terms_of, call.out, begin, end);
}

}  // namespace
}  // namespace distilbert_fast
