// The two vocabulary losses of linear_kl_div on one row of logits s, and their gradients:
//
//     kl = τ² Σ p_t (log p_t − log p_s), p = softmax(logits / τ)       d kl / d s = τ (p_s − p_t), written over s
//     ce = −log softmax(s)[label]                                      d ce / d s = softmax(s) − onehot(label)
//
// The row stays in L2 from its first pass to its last: sums of kl_div_rows.h, maximum and sum at τ = 1, gradient of the
// cross-entropy into memory of its own, gradient of the KL in place.
#pragma once

namespace distilbert_fast {
namespace {

// max x and Σ 2^((x − max x) k), added in blocks as in kl_div.
template <class S>
double exponential_sum(const S* x, int64_t columns, float k, float& top) {
  constexpr int64_t lanes = Vec::lanes;
  Vec m = broadcast(kLowest);
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) m = maximum(m, load(x + i));
  if (i < columns) m = maximum(m, load_first(x + i, columns - i, kLowest));
  top = largest(m);
  const Vec vm = broadcast(top), vk = broadcast(k);
  double total = 0;
  for (int64_t block = 0; block < columns; block += kBlock) {
    const int64_t end = block + smaller(kBlock, columns - block);
    Vec z = broadcast(0);
    for (i = block; i + lanes <= end; i += lanes) z = add(z, exp2(mul(sub(load(x + i), vm), vk)));
    if (i < end) z = add(z, exp2(mul(sub(load_first(x + i, end - i, kNone), vm), vk)));
    total += sum(z);
  }
  return total;
}

template <class S>
float element(const S* x) {
  return sum(load_first(x, 1, 0));
}

// factor · 2^((x − top) k)
struct Exponentials {
  Vec top, k, factor;

  Exponentials(float top, float k, double factor)
      : top(broadcast(top)), k(broadcast(k)), factor(broadcast(static_cast<float>(factor))) {}

  Vec of(Vec x) const { return mul(exp2(mul(sub(x, top), k)), factor); }

  // out may be x.
  template <class S>
  void write(S* out, const S* x, int64_t columns) const {
    int64_t i = 0;
    for (; i + Vec::lanes <= columns; i += Vec::lanes) store(out + i, of(load(x + i)));
    if (i < columns) store_first(out + i, of(load_first(x + i, columns - i, 0)), columns - i);
  }
};

// Returns the loss; writes the gradient where there is memory for it.
template <class S>
float cross_entropy_row(const S* s, int64_t columns, int64_t label, S* gradient) {
  const float k = static_cast<float>(kLog2e);
  float top;
  const double z = exponential_sum(s, columns, k, top);
  const double below = static_cast<double>(top) - element(s + label);
  if (gradient) {
    const Exponentials p(top, k, 1 / z);
    p.write(gradient, s, columns);
    store_first(gradient + label, sub(p.of(load_first(s + label, 1, 0)), broadcast(1)), 1);
  }
  return static_cast<float>(below + std::log2(z) / kLog2e);
}

// The cross-entropy of row r, whose logits it returns.
template <class S>
S* with_cross_entropy(const VocabularyLosses& call, int64_t r) {
  S* s = static_cast<S*>(call.student) + r * call.columns;
  if (call.labels && call.labels[r] >= 0) {
    S* gradient = call.gradient ? static_cast<S*>(call.ce_gradient) + call.slots[r] * call.columns : nullptr;
    call.ce[r] = cross_entropy_row(s, call.columns, call.labels[r], gradient);
  } else if (call.ce) {
    call.ce[r] = 0;
  }
  return s;
}

template <class S, class T>
void linear_kl_div_rows(const LinearKlDivRows& call, int64_t begin, int64_t end) {
  const VocabularyLosses& losses = call.losses;
  const int64_t columns = losses.columns;
  const double tau = losses.temperature;
  const float k = static_cast<float>(kLog2e / tau);
  for (int64_t r = begin; r < end; ++r) {
    S* s = with_cross_entropy<S>(losses, r);
    if (r >= losses.kl_rows) continue;
    const T* t = static_cast<const T*>(call.teacher) + r * columns;
    const RowSums row = sums(s, t, columns, k);
    losses.kl[r] = row_loss(row, tau, k);
    if (losses.gradient) {
      const GradientRow<S, T> out(s, t, k, row.m_s, row.z_s, row.m_t, row.z_t, tau);
      out.write(s, columns, false);
    }
  }
}

inline void linear_kl_div(const LinearKlDivRows& call, int64_t begin, int64_t end) {
  with_types(call.losses.student_dtype, call.teacher_dtype,
             [&](auto s, auto t) { linear_kl_div_rows<decltype(s), decltype(t)>(call, begin, end); });
}

}  // namespace
}  // namespace distilbert_fast
