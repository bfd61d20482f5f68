// fit_scale on one row:   Σ h (w − s · clamp(round(w / s), −127, 127))²   for s = max |w| / 127 · (1.05 − i / 800).
//
// Four scales a pass: the row and h are read 20 times, from the first cache. Sums are float32, a lane each.
#pragma once

namespace distilbert_fast {
namespace {

constexpr int kScalesAtOnce = 4;

template <class T>
float fitted_scale(const FitScaleRows& call, const T* w) {
  constexpr int64_t lanes = Vec::lanes;
  const float largest = scale_of(largest_magnitude(w, call.columns));
  if (!(largest > 0) || largest > 3.4028234e38f) return largest;  // 0, NaN or ∞
  const Vec low = broadcast(-127.0f), high = broadcast(127.0f);
  float best = largest * 1.05f, least = __builtin_inff();
  for (int first = 0; first < kFitSteps; first += kScalesAtOnce) {
    float scales[kScalesAtOnce];
    Vec scale[kScalesAtOnce], inverse[kScalesAtOnce], total[kScalesAtOnce];
    for (int j = 0; j < kScalesAtOnce; ++j) {
      scales[j] = largest * (1.05f - static_cast<float>(first + j) / (10.0f * kFitSteps));
      scale[j] = broadcast(scales[j]);
      inverse[j] = broadcast(inverse_of(scales[j]));
      total[j] = broadcast(0.0f);
    }
    const auto count = [&](Vec x, Vec h) {
      for (int j = 0; j < kScalesAtOnce; ++j) {
        const Vec code = round_to_int(minimum(maximum(mul(x, inverse[j]), low), high));
        const Vec error = fnma(code, scale[j], x);
        total[j] = fma(mul(error, h), error, total[j]);
      }
    };
    int64_t i = 0;
    for (; i + lanes <= call.columns; i += lanes) {
      count(load(w + i), call.importance == nullptr ? broadcast(1.0f) : load(call.importance + i));
    }
    if (i < call.columns) {
      const int64_t n = call.columns - i;
      count(load_first(w + i, n, 0),
            call.importance == nullptr ? broadcast(1.0f) : load_first(call.importance + i, n, 0));
    }
    for (int j = 0; j < kScalesAtOnce; ++j) {
      const float error = sum(total[j]);
      if (error < least) {
        least = error;
        best = scales[j];
      }
    }
  }
  return best;
}

template <class T>
void fit_scales(const FitScaleRows& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    call.scale[r] = fitted_scale(call, static_cast<const T*>(call.w) + r * call.w_stride);
  }
}

inline void fit_scale(const FitScaleRows& call, int64_t begin, int64_t end) {
  with_type(call.w_dtype, [&](auto w) { fit_scales<decltype(w)>(call, begin, end); });
}

}  // namespace
}  // namespace distilbert_fast
