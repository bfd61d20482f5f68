// Functions of a Vec, and on rows, that every tier computes alike.
#pragma once

namespace distilbert_fast {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLowest = -3.402823466e38f;  // of finite floats
constexpr float kNone = -__builtin_inff();

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void write_zeros(T* out, int64_t columns) {
  int64_t i = 0;
  for (; i + Vec::lanes <= columns; i += Vec::lanes) store(out + i, broadcast(0));
  if (i < columns) store_first(out + i, broadcast(0), columns - i);
}

// 2^x for x ≤ 0, −∞ too: x = n + f with |f| ≤ 1/2; 2^f by the minimax polynomial of degree 6 (relative error 2e-9).
// Below 2^-125 it is 0: a subnormal number would cost a hundred cycles. A NaN stays one.
inline Vec exp2(Vec x) {
  const Vec n = round_to_int(x);
  const Vec f = sub(x, n);
  Vec p = broadcast(0x1.41d334p-13f);
  p = fma(p, f, broadcast(0x1.5f456ap-10f));
  p = fma(p, f, broadcast(0x1.3b2dbcp-7f));
  p = fma(p, f, broadcast(0x1.c6aed4p-5f));
  p = fma(p, f, broadcast(0x1.ebfbdap-3f));
  p = fma(p, f, broadcast(0x1.62e430p-1f));
  p = fma(p, f, broadcast(1.0f));
  return times_power_of_two(p, n);
}

// function(x) with an element of a dtype, function(x, y) with one of each of two.
template <class Function>
void with_type(DType dtype, const Function& function) {
  dtype == DType::float32 ? function(float{}) : function(bfloat16{});
}
template <class Function>
void with_types(DType first, DType second, const Function& function) {
  with_type(first, [&](auto x) { with_type(second, [&](auto y) { function(x, y); }); });
}

}  // namespace
}  // namespace distilbert_fast
