// quantize on one row:   scale = max |x| / 127,   r = 1 / scale,   code = round(clamp(x r, −127, 127)).
//
// Each operation is rounded once, so the bits are those of ops/quantize.py. Magnitudes are compared as integers, in
// whose order NaN stands above ∞: a NaN anywhere ends in the scale. Pass 1 finds the maximum, pass 2 finds the row in
// L1 (a long one in L2) and writes the codes; with a given scale there is only pass 2.
#pragma once

namespace distilbert_fast {
namespace {

constexpr float kSmallestScale = 0x1p-126f;  // TINY: the reciprocal of any scale from here up is finite

template <class T>
float largest_magnitude(const T* x, int64_t n) {
  constexpr int64_t lanes = Vec::lanes;
  Vec largest = broadcast(0);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) largest = larger_magnitude(largest, load(x + i));
  if (i < n) largest = larger_magnitude(largest, load_first(x + i, n - i, 0));
  return largest_magnitude(largest);
}

inline float scale_of(float largest) {
  const float scale = largest / 127.0f;
  return scale < kSmallestScale ? 0.0f : scale;
}

inline float inverse_of(float scale) { return scale >= kSmallestScale ? 1.0f / scale : 0.0f; }

// Codes by a scale that may be anything.
template <class T>
void write_codes(const T* x, int64_t n, float inverse, uint8_t* codes, uint8_t flip) {
  constexpr int64_t lanes = Vec::lanes;
  const Vec r = broadcast(inverse);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store_codes(codes + i, mul(load(x + i), r), flip);
  if (i < n) store_codes_first(codes + i, mul(load_first(x + i, n - i, 0), r), flip, n - i);
}

// Codes by the row's own scale: either every code is 0, or x is finite and needs no clamp.
template <class T>
void write_own_codes(const T* x, int64_t n, float inverse, uint8_t* codes, uint8_t flip) {
  constexpr int64_t lanes = Vec::lanes;
  if (inverse == 0) {
    for (int64_t i = 0; i < n; ++i) codes[i] = flip;
    return;
  }
  const Vec r = broadcast(inverse);
  const auto at = [&](int64_t i) { return mul(load(x + i), r); };
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    store_small_codes(codes + i, at(i), at(i + lanes), at(i + 2 * lanes), at(i + 3 * lanes), flip);
  }
  write_codes(x + i, n - i, inverse, codes + i, flip);
}

template <class T>
void quantize_rows(const QuantizeRows& call, int64_t begin, int64_t end) {
  const Codes& codes = call.codes;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(call.x) + r * call.x_stride;
    const float scale =
        codes.scale_in ? codes.scale_in[r * codes.scale_in_stride] : scale_of(largest_magnitude(x, call.columns));
    if (codes.scale_out) codes.scale_out[r] = scale;
    const auto write = codes.scale_in ? write_codes<T> : write_own_codes<T>;
    write(x, call.columns, inverse_of(scale), codes.data + r * codes.stride, codes.flip);
  }
}

inline void quantize(const QuantizeRows& call, int64_t begin, int64_t end) {
  with_type(call.x_dtype, [&](auto x) { quantize_rows<decltype(x)>(call, begin, end); });
}

}  // namespace
}  // namespace distilbert_fast
