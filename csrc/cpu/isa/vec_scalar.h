// Vec: 4 floats by the compiler's own vector type, in whatever registers the baseline of the machine has.
#pragma once

#include <cstring>

#include "cpu/isa/kernels.h"

namespace distilbert_fast {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

struct Vec {
  static constexpr int64_t lanes = 4;
  Floats v;
};

inline Vec broadcast(float x) { return {Floats{x, x, x, x}}; }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
inline Vec maximum(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }

inline float largest(Vec a) {
  float x = a.v[0];
  for (int i = 1; i < 4; ++i) x = a.v[i] > x ? a.v[i] : x;
  return x;
}
inline float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x.v, p, sizeof x.v);
  return x;
}
inline Vec load(const bfloat16* p) {
  const Bits bits = Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16;
  return {reinterpret_cast<Floats>(bits)};
}
template <class T>
Vec load_first(const T* p, int64_t n, float fill) {
  T part[Vec::lanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  Vec x = load(part);
  for (int64_t i = n; i < Vec::lanes; ++i) x.v[i] = fill;
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof x.v); }
inline void store(bfloat16* p, Vec x) {  // round half to even; a NaN stays one
  const Bits bits = reinterpret_cast<Bits>(x.v);
  const Bits rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
  for (int i = 0; i < 4; ++i) p[i].bits = static_cast<uint16_t>(x.v[i] != x.v[i] ? 0x7fc0u : rounded[i]);
}
template <class T>
void store_first(T* p, Vec x, int64_t n) {
  T part[Vec::lanes];
  store(part, x);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

// The baseline has no portable store around the caches.
template <class T>
void stream(T* p, Vec x) {
  store(p, x);
}
inline void finish_streams() {}

// Adding 1.5 · 2^23 leaves no room for a fraction; what is far below is whole already.
inline Vec round_to_int(Vec x) {
  const Floats shift = broadcast(12582912.0f).v;
  return {x.v < -4194304.0f ? x.v : (x.v + shift) - shift};
}

// x · 2^n for whole n ≤ 127; 0 for n < −125. A NaN stays one.
inline Vec times_power_of_two(Vec x, Vec n) {
  const Floats kept = n.v < -125.0f ? broadcast(-125.0f).v : n.v;
  const Ints power = (__builtin_convertvector(kept, Ints) + 127) << 23;
  return {n.v < -125.0f ? broadcast(0.0f).v : x.v * reinterpret_cast<Floats>(power)};
}

inline Vec minimum(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec magnitude(Vec a) { return {reinterpret_cast<Floats>(reinterpret_cast<Bits>(a.v) & 0x7fffffffu)}; }
inline Vec from_int32(const int32_t* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return {__builtin_convertvector(x, Floats)};
}
inline Vec from_int8(const int8_t* p) { return {Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}}; }

// In a register from here on: not to be loaded again by each instruction that reads it.
inline void hold(Vec&) {}

// Of pairs of bfloat16, the elements at even and at odd places.
inline Bits load_bits(const void* p) {
  Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
inline Vec even_of_pairs(const void* p) { return {reinterpret_cast<Floats>(load_bits(p) << 16)}; }
inline Vec odd_of_pairs(const void* p) { return {reinterpret_cast<Floats>(load_bits(p) & 0xffff0000u)}; }

// The larger of a, itself a magnitude, and |b| by the order of their bits: finite < ∞ < NaN.
inline Vec larger_magnitude(Vec a, Vec b) {
  const Ints x = reinterpret_cast<Ints>(a.v), y = reinterpret_cast<Ints>(b.v) & 0x7fffffff;
  return {reinterpret_cast<Floats>(x > y ? x : y)};
}
inline float largest_magnitude(Vec a) {
  Vec x = a;
  x = larger_magnitude(x, {Floats{a.v[1], a.v[0], a.v[3], a.v[2]}});
  return larger_magnitude(x, {Floats{x.v[2], x.v[3], x.v[0], x.v[1]}}).v[0];
}

// x clamped to ±127 and rounded half to even, in two's complement XOR flip; NaN gives 0.
inline void store_codes_first(uint8_t* p, Vec x, uint8_t flip, int64_t n) {
  const Floats low = x.v > 127.0f ? broadcast(127).v : x.v;
  const Floats known = x.v == x.v ? low : broadcast(0).v;
  const Ints whole = __builtin_convertvector(round_to_int({known < -127.0f ? broadcast(-127).v : known}).v, Ints);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(static_cast<uint8_t>(whole[i]) ^ flip);
}
inline void store_codes(uint8_t* p, Vec x, uint8_t flip) { store_codes_first(p, x, flip, Vec::lanes); }
// Of four vectors whose values round to ±127 at most.
inline void store_small_codes(uint8_t* p, Vec a, Vec b, Vec c, Vec d, uint8_t flip) {
  const Vec all[4] = {a, b, c, d};
  for (int k = 0; k < 4; ++k) {
    const Ints whole = __builtin_convertvector(round_to_int(all[k]).v, Ints);
    for (int i = 0; i < 4; ++i) p[4 * k + i] = static_cast<uint8_t>(static_cast<uint8_t>(whole[i]) ^ flip);
  }
}

inline void transpose(Vec (&x)[4]) {
  const Vec rows[4] = {x[0], x[1], x[2], x[3]};
  for (int i = 0; i < 4; ++i) x[i].v = Floats{rows[0].v[i], rows[1].v[i], rows[2].v[i], rows[3].v[i]};
}

// The tables [8, 16] of a panel of codebook16.
struct CodeTables {
  const uint8_t* tables;

  explicit CodeTables(const uint8_t* tables) : tables(tables) {}

  // A block.
  void expand(const uint8_t* codes, uint8_t* out) const {
    for (int64_t i = 0; i < kHalfBytes; ++i) {
      const uint8_t* const table = tables + i % 64 / 16 * 16;
      out[i] = table[codes[i] & 15];
      out[kHalfBytes + i] = table[64 + (codes[i] >> 4)];
    }
  }
};

}  // namespace
}  // namespace distilbert_fast
