// Gradients of LayerNorm on one row h. With g = dy w and ĥ = (h − μ) rstd:
//
//   dh = rstd (g − mean g − ĥ mean (g ĥ)),   and dy ĥ, dy are this row's parts of dw, db.
//
// Pass 1 makes h again, on the stack, pass 2 adds up both means, pass 3 writes dh and adds to the sums of dw and db:
// all in L1 but the first reading of h's terms and of dy. A row longer than the stack holds is made again, chunk by
// chunk, in both.
#pragma once

namespace distilbert_fast {
namespace {

// What of a row every column needs.
struct RowGradient {
  Vec mean, rstd, mean_g, mean_gh;

  Vec normalized(Vec h) const { return mul(sub(h, mean), rstd); }
};

// g, rounded, the same in both passes: a mul would be contracted with what follows it, and where g − mean g is 0, as
// for a single column, rounding times rstd would be left.
inline Vec scaled(Vec dy, Vec w) { return fma(dy, w, broadcast(0)); }

// Adds Σ g and Σ g ĥ to the two sums.
template <class T>
void add_means(const float* h, const T* dy, const float* w, int64_t n, const RowGradient& row, double& sum_g,
               double& sum_gh) {
  constexpr int64_t lanes = Vec::lanes;
  Vec g_sums[2] = {broadcast(0), broadcast(0)}, gh_sums[2] = {broadcast(0), broadcast(0)};
  const auto take = [&](int k, Vec vh, Vec vdy, Vec vw) {
    const Vec g = scaled(vdy, vw);
    g_sums[k] = add(g_sums[k], g);
    gh_sums[k] = fma(g, row.normalized(vh), gh_sums[k]);
  };
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    for (int k = 0; k < 2; ++k) take(k, load(h + i + k * lanes), load(dy + i + k * lanes), load(w + i + k * lanes));
  }
  if (i + lanes <= n) {
    take(0, load(h + i), load(dy + i), load(w + i));
    i += lanes;
  }
  if (i < n) take(1, load_first(h + i, n - i, 0), load_first(dy + i, n - i, 0), load_first(w + i, n - i, 0));
  sum_g += sum(add(g_sums[0], g_sums[1]));
  sum_gh += sum(add(gh_sums[0], gh_sums[1]));
}

template <class T, class D>
void write_gradient(const float* h, const T* dy, const float* w, int64_t n, const RowGradient& row, D* dh, float* dw,
                    float* db) {
  constexpr int64_t lanes = Vec::lanes;
  const auto gradient = [&](Vec normal, Vec vdy, Vec vw) {
    return mul(row.rstd, fnma(normal, row.mean_gh, sub(scaled(vdy, vw), row.mean_g)));
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const Vec vdy = load(dy + i), normal = row.normalized(load(h + i));
    store(dh + i, gradient(normal, vdy, load(w + i)));
    store(dw + i, fma(vdy, normal, load(dw + i)));
    store(db + i, add(vdy, load(db + i)));
  }
  if (i < n) {
    const Vec vdy = load_first(dy + i, n - i, 0), normal = row.normalized(load_first(h + i, n - i, 0));
    store_first(dh + i, gradient(normal, vdy, load_first(w + i, n - i, 0)), n - i);
    store_first(dw + i, fma(vdy, normal, load_first(dw + i, n - i, 0)), n - i);
    store_first(db + i, add(vdy, load_first(db + i, n - i, 0)), n - i);
  }
}

// Row r of a call, whose h is the sum of `rows`.
template <class T, class D>
void differentiate_row(AddRows add_rows, const void* const rows[3], const NormalizedGradient& call, int64_t r) {
  alignas(64) float stack[kChunk];
  const int64_t columns = call.columns;
  const auto each_chunk = [&](bool make, auto&& pass) {
    for (int64_t c = 0; c < columns; c += kChunk) {
      const int64_t n = smaller(kChunk, columns - c);
      if (make || columns > kChunk) add_rows(rows, c, n, stack);
      pass(c, n);
    }
  };
  const T* dy = static_cast<const T*>(call.dy) + r * call.dy_stride;
  D* dh = static_cast<D*>(call.dh) + r * call.columns;
  float* dw = call.sums + r / kRowsOfSum * 2 * columns;
  RowGradient row = {broadcast(call.mean[r]), broadcast(call.rstd[r]), broadcast(0), broadcast(0)};

  double sum_g = 0, sum_gh = 0;
  each_chunk(true, [&](int64_t c, int64_t n) { add_means(stack, dy + c, call.weight + c, n, row, sum_g, sum_gh); });
  row.mean_g = broadcast(static_cast<float>(sum_g / columns));
  row.mean_gh = broadcast(static_cast<float>(sum_gh / columns));
  each_chunk(false, [&](int64_t c, int64_t n) {
    write_gradient(stack, dy + c, call.weight + c, n, row, dh + c, dw + c, dw + columns + c);
  });
}

using DifferentiateRow = void (*)(AddRows, const void* const rows[3], const NormalizedGradient&, int64_t r);

inline DifferentiateRow differentiate_row_of(const NormalizedGradient& call) {
  static constexpr DifferentiateRow instances[2][2] = {
      {differentiate_row<float, float>, differentiate_row<float, bfloat16>},
      {differentiate_row<bfloat16, float>, differentiate_row<bfloat16, bfloat16>}};
  return instances[static_cast<int>(call.dy_dtype)][static_cast<int>(call.dh_dtype)];
}

inline void layer_norm_backward(const LayerNormGradientRows& call, int64_t begin, int64_t end) {
  const AddRows add_rows = add_rows_of(call.x_dtype, type_of(call.residual, call.residual_dtype), 2);
  const DifferentiateRow differentiate_row = differentiate_row_of(call.gradient);
  for (int64_t r = begin; r < end; ++r) {
    const void* rows[3] = {row_at(call.x, call.x_dtype, r * call.x_stride), nullptr, nullptr};
    if (call.residual) rows[1] = row_at(call.residual, call.residual_dtype, r * call.residual_stride);
    differentiate_row(add_rows, rows, call.gradient, r);
  }
}

}  // namespace
}  // namespace distilbert_fast
