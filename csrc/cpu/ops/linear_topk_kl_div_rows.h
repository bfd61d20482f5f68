// The KL of linear_topk_kl_div on one row of logits s, and its gradient; the cross-entropy is that of linear_kl_div:
//
//     kl = τ² [Σ_i p_i (log p_i − log q_i) + p_tail (log p_tail − log q_tail)],  q = softmax(s / τ), i over the ids
//     d kl / d s = τ (P q_i − p_i) at ids,  τ (P q_tail − p_tail) q_v / q_tail elsewhere;  P = Σ p_i + p_tail
//
// The logits at ids are taken aside, into double, and −∞ stands in their place: so both passes over the row, maximum
// and sum, then the gradient, see the tail alone, and no small tail is the difference of two large sums.
#pragma once

namespace distilbert_fast {
namespace {

// p (log p − log q), 0 at p = 0.
inline double divergence_term(double p, double log_p, double log_q) { return p == 0 ? 0 : p * (log_p - log_q); }

// Returns the loss. scratch: 2 kept numbers.
template <class S>
float topk_row(S* s, int64_t columns, const int64_t* ids, const float* log_p, double log_tail, int64_t kept, double tau,
               bool gradient, double* scratch) {
  double *p = scratch, *log_q = scratch + kept;
  float top = kLowest, top_of_rest;
  for (int64_t i = 0; i < kept; ++i) {
    const float x = element(s + ids[i]);
    top = x > top ? x : top;
    log_q[i] = x;
  }
  for (int64_t i = 0; i < kept; ++i) store_first(s + ids[i], broadcast(kNone), 1);
  const float k = static_cast<float>(kLog2e / tau);
  const double z_rest = exponential_sum(s, columns, k, top_of_rest);  // 0 where all tokens are kept
  top = top_of_rest > top ? top_of_rest : top;
  const double below = (static_cast<double>(top_of_rest) - top) / tau;
  double z = z_rest * std::exp(below);
  for (int64_t i = 0; i < kept; ++i) {
    log_q[i] = (log_q[i] - top) / tau;
    z += std::exp(log_q[i]);
  }

  const double log_z = std::log(z), p_tail = std::exp(log_tail), log_q_tail = std::log(z_rest) + below - log_z;
  double mass = p_tail, loss = divergence_term(p_tail, log_tail, log_q_tail);
  for (int64_t i = 0; i < kept; ++i) {
    p[i] = std::exp(static_cast<double>(log_p[i]));
    log_q[i] -= log_z;
    mass += p[i];
    loss += divergence_term(p[i], log_p[i], log_q[i]);
  }
  if (gradient) {
    const double of_tail = tau * (mass * std::exp(log_q_tail) - p_tail);
    Exponentials(top_of_rest, k, z_rest == 0 ? 0 : of_tail / z_rest).write(s, s, columns);
    for (int64_t i = 0; i < kept; ++i) {
      const double at_id = tau * (mass * std::exp(log_q[i]) - p[i]);
      store_first(s + ids[i], broadcast(static_cast<float>(at_id)), 1);
    }
  }
  return static_cast<float>(tau * tau * loss);
}

template <class S>
void linear_topk_kl_div_rows(const LinearTopKKlDivRows& call, int64_t begin, int64_t end, double* scratch) {
  const VocabularyLosses& losses = call.losses;
  for (int64_t r = begin; r < end; ++r) {
    S* s = with_cross_entropy<S>(losses, r);
    if (r >= losses.kl_rows) continue;
    losses.kl[r] = topk_row(s, losses.columns, call.ids + r * call.kept, call.log_p + r * call.kept, call.log_tail[r],
                            call.kept, losses.temperature, losses.gradient, scratch);
  }
}

inline void linear_topk_kl_div(const LinearTopKKlDivRows& call, int64_t begin, int64_t end, void* scratch) {
  const auto rows =
      call.losses.student_dtype == DType::float32 ? linear_topk_kl_div_rows<float> : linear_topk_kl_div_rows<bfloat16>;
  rows(call, begin, end, static_cast<double*>(scratch));
}

}  // namespace
}  // namespace distilbert_fast
