// kl_div on one row:   loss = τ² Σ p_t (log p_t − log p_s),   d loss / d s = τ (p_s − p_t),   p = softmax(logits / τ).
//
// With k = log2(e)/τ, d = x − max x and e = 2^(k d):   Z = Σ e,   p = e / Z,   W = Σ e_t (d_t − d_s), so
//   loss = τ/k (k W / Z_t + log2 Z_s − log2 Z_t).
// A common offset of the logits falls out in d before anything is rounded, and equal logits give exactly 0. W is added
// in units of 2^20, so that vocabularies masked with the lowest float on either side stay finite.
//
// Pass 1 reads both rows from memory in blocks that stay in L1: the block's maxima, then its three sums under the
// running maxima; sums of blocks are added in double. Pass 2 finds the rows in L2 and writes the gradient: each logit
// comes from memory once.
#pragma once

#include <cmath>

namespace distilbert_fast {
namespace {

constexpr int64_t kBlock = 64 * Vec::lanes;  // columns: a lane adds 64 terms in float before double takes over
constexpr double kUnit = 1 << 20;            // of W
constexpr float kNoFloor[16] = {kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone,
                                kNone, kNone, kNone, kNone, kNone, kNone, kNone, kNone};

// What a row is reduced to: for both sides the maximum and Z.
struct RowSums {
  float m_s = kLowest, m_t = kLowest;
  double z_s = 0, z_t = 0, w = 0;
};

// Raise the running maxima: earlier sums held d measured from the old ones.
inline void raise_maxima(RowSums& row, float m_s, float m_t, double k) {
  if (m_s > row.m_s) {
    const double rise = static_cast<double>(m_s) - row.m_s;
    row.z_s *= std::exp2(-rise * k);
    row.w += row.z_t * rise;
    row.m_s = m_s;
  }
  if (m_t > row.m_t) {
    const double rise = static_cast<double>(m_t) - row.m_t, factor = std::exp2(-rise * k);
    row.w = (row.w - row.z_t * rise) * factor;
    row.z_t *= factor;
    row.m_t = m_t;
  }
}

template <class S, class T>
void add_block(RowSums& row, const S* s, const T* t, int64_t n, float k) {
  constexpr int64_t lanes = Vec::lanes;
  const int64_t whole = n - n % lanes;
  Vec max_s = broadcast(kLowest), max_t = broadcast(kLowest);
  for (int64_t i = 0; i < whole; i += lanes) {
    max_s = maximum(max_s, load(s + i));
    max_t = maximum(max_t, load(t + i));
  }
  if (whole < n) {
    max_s = maximum(max_s, load_first(s + whole, n - whole, kLowest));
    max_t = maximum(max_t, load_first(t + whole, n - whole, kLowest));
  }
  raise_maxima(row, largest(max_s), largest(max_t), k);

  const Vec vk = broadcast(k), m_s = broadcast(row.m_s), m_t = broadcast(row.m_t);
  const Vec unit = broadcast(static_cast<float>(1 / kUnit));
  Vec z_s = broadcast(0), z_t = broadcast(0), w = broadcast(0);
  const auto add_columns = [&](Vec d_s, Vec d_t) {
    const Vec e_t = exp2(mul(d_t, vk));
    z_s = add(z_s, exp2(mul(d_s, vk)));
    z_t = add(z_t, e_t);
    w = fma(mul(e_t, unit), sub(d_t, d_s), w);
  };
  for (int64_t i = 0; i < whole; i += lanes) add_columns(sub(load(s + i), m_s), sub(load(t + i), m_t));
  if (whole < n) {
    // Lanes beyond the row, and only those, get a d that adds nothing. (maximum keeps a NaN that stands on its right.)
    const Vec floor = load_first(kNoFloor, n - whole, -1e30f);
    const Vec d_s = sub(load_first(s + whole, n - whole, kLowest), m_s);
    const Vec d_t = sub(load_first(t + whole, n - whole, kLowest), m_t);
    add_columns(maximum(floor, d_s), maximum(floor, d_t));
  }
  row.z_s += sum(z_s);
  row.z_t += sum(z_t);
  row.w += sum(w) * kUnit;
}

template <class S, class T>
RowSums sums(const S* s, const T* t, int64_t columns, float k) {
  RowSums row;
  for (int64_t i = 0; i < columns; i += kBlock) add_block(row, s + i, t + i, smaller(kBlock, columns - i), k);
  return row;
}

inline float row_loss(const RowSums& row, double tau, float k) {
  const double bits = k * row.w / row.z_t + std::log2(row.z_s) - std::log2(row.z_t);
  return static_cast<float>(tau / k * bits);  // the rounded k, so that its rounding cancels
}

// gradient = a · 2^((s − m_s) k) − b · 2^((t − m_t) k)
template <class S, class T>
struct GradientRow {
  const S* s;
  const T* t;
  Vec k, m_s, m_t, a, b;

  GradientRow(const S* s, const T* t, double k, float m_s, double z_s, float m_t, double z_t, double scale)
      : s(s),
        t(t),
        k(broadcast(static_cast<float>(k))),
        m_s(broadcast(m_s)),
        m_t(broadcast(m_t)),
        a(broadcast(static_cast<float>(scale / z_s))),
        b(broadcast(static_cast<float>(scale / z_t))) {}

  Vec at(Vec x_s, Vec x_t) const {
    const Vec e_s = exp2(mul(sub(x_s, m_s), k)), e_t = exp2(mul(sub(x_t, m_t), k));
    return fnma(b, e_t, mul(a, e_s));
  }
  Vec at(int64_t i) const { return at(load(s + i), load(t + i)); }
  Vec at_first(int64_t i, int64_t n) const { return at(load_first(s + i, n, 0), load_first(t + i, n, 0)); }

  void write(S* out, int64_t columns, bool around_caches) const {
    constexpr int64_t lanes = Vec::lanes;
    int64_t i = 0;
    if (around_caches && lanes > 1) {
      const auto misaligned = reinterpret_cast<uintptr_t>(out) / sizeof(S) % lanes;
      const int64_t head = misaligned == 0 ? 0 : smaller(lanes - static_cast<int64_t>(misaligned), columns);
      if (head > 0) store_first(out, at_first(0, head), head);
      for (i = head; i + lanes <= columns; i += lanes) stream(out + i, at(i));
    } else {
      for (; i + lanes <= columns; i += lanes) store(out + i, at(i));
    }
    if (i < columns) store_first(out + i, at_first(i, columns - i), columns - i);
  }
};

template <class S, class T>
void forward_rows(const KlDivForward& call, int64_t begin, int64_t end) {
  const KlDivLogits& logits = call.logits;
  const int64_t columns = logits.columns;
  const double tau = logits.temperature;
  const float k = static_cast<float>(kLog2e / tau);
  for (int64_t r = begin; r < end; ++r) {
    const S* s = static_cast<const S*>(logits.student) + r * logits.student_stride;
    const T* t = static_cast<const T*>(logits.teacher) + r * logits.teacher_stride;
    S* gradient = call.gradient ? static_cast<S*>(call.gradient) + r * columns : nullptr;
    float* stats = call.stats ? call.stats + 4 * r : nullptr;
    if (logits.mask && !logits.mask[r]) {
      call.loss[r] = 0;
      if (stats) stats[0] = stats[2] = 0, stats[1] = stats[3] = 1;
      if (gradient) write_zeros(gradient, columns);
      continue;
    }
    const RowSums row = sums(s, t, columns, k);
    call.loss[r] = row_loss(row, tau, k);
    if (stats) {
      stats[0] = row.m_s, stats[1] = static_cast<float>(row.z_s);
      stats[2] = row.m_t, stats[3] = static_cast<float>(row.z_t);
    }
    if (gradient) {
      const GradientRow<S, T> out(s, t, k, row.m_s, row.z_s, row.m_t, row.z_t, tau * call.gradient_scale);
      out.write(gradient, columns, call.stream);
    }
  }
  if (call.stream) finish_streams();
}

template <class S, class T>
void backward_rows(const KlDivBackward& call, int64_t begin, int64_t end) {
  const KlDivLogits& logits = call.logits;
  const int64_t columns = logits.columns;
  for (int64_t r = begin; r < end; ++r) {
    S* gradient = static_cast<S*>(call.gradient) + r * columns;
    if (logits.mask && !logits.mask[r]) {
      write_zeros(gradient, columns);
      continue;
    }
    const float* stats = call.stats + 4 * r;
    const GradientRow<S, T> out(static_cast<const S*>(logits.student) + r * logits.student_stride,
                                static_cast<const T*>(logits.teacher) + r * logits.teacher_stride,
                                kLog2e / logits.temperature, stats[0], stats[1], stats[2], stats[3],
                                logits.temperature * call.dloss[r]);
    out.write(gradient, columns, call.stream);
  }
  if (call.stream) finish_streams();
}

inline void kl_div_forward(const KlDivForward& call, int64_t begin, int64_t end) {
  with_types(call.logits.student_dtype, call.logits.teacher_dtype,
             [&](auto s, auto t) { forward_rows<decltype(s), decltype(t)>(call, begin, end); });
}

inline void kl_div_backward(const KlDivBackward& call, int64_t begin, int64_t end) {
  with_types(call.logits.student_dtype, call.logits.teacher_dtype,
             [&](auto s, auto t) { backward_rows<decltype(s), decltype(t)>(call, begin, end); });
}

}  // namespace
}  // namespace distilbert_fast
