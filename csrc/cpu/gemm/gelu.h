// GELU of a Vec: x Φ(x), Φ the normal distribution function.
#pragma once

namespace distilbert_fast {
namespace {

// max(x, 0) − |x| Φ(−|x|), with Φ(−a) = exp(−a²/2) · q(a / (a + 4)), q of degree 7 with q(0) = 1/2 (an error of at most
// 2e-8 in Φ): torch's own error is the larger one.
inline Vec gelu(Vec x) {
  const Vec a = magnitude(x);
  const Vec u = div(a, add(a, broadcast(4.0f)));
  Vec q = broadcast(0x1.83d23ep-4f);
  q = fma(q, u, broadcast(-0x1.3942a4p-2f));
  q = fma(q, u, broadcast(0x1.2a6f20p-3f));
  q = fma(q, u, broadcast(0x1.b9b050p-1f));
  q = fma(q, u, broadcast(-0x1.0d7ea0p+1f));
  q = fma(q, u, broadcast(0x1.33bbcep+1f));
  q = fma(q, u, broadcast(-0x1.988440p+0f));
  q = fma(q, u, broadcast(0.5f));
  const Vec tail = mul(q, exp2(mul(mul(a, a), broadcast(-0x1.715476p-1f))));  // exp(−a²/2) = 2^(−a²/(2 ln 2))
  return fnma(a, tail, maximum(broadcast(0.0f), x));  // a NaN, on the right, stays one; ±∞ becomes one
}

// Φ(x) as 1/2 + x p(x²), p of degree 6, where |x| < 3.9: an error of at most 1.5e-4 in the result.
inline Vec gelu_fast(Vec x) {
  const Vec z = maximum(broadcast(-3.9f), minimum(broadcast(3.9f), x));
  const Vec t = mul(z, z);
  Vec p = broadcast(0x1.c356f4p-26f);
  p = fma(p, t, broadcast(-0x1.db434ap-20f));
  p = fma(p, t, broadcast(0x1.adcf10p-15f));
  p = fma(p, t, broadcast(-0x1.bac462p-11f));
  p = fma(p, t, broadcast(0x1.24163cp-7f));
  p = fma(p, t, broadcast(-0x1.09b492p-4f));
  p = fma(p, t, broadcast(0x1.97a3c0p-2f));
  return mul(x, fma(z, p, broadcast(0.5f)));
}

}  // namespace
}  // namespace distilbert_fast
