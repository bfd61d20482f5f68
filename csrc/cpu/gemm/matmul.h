// C = A B in float32: A by broadcasts of single elements, so it may lie anywhere (transposed too); B by rows of whole
// vectors, so they are padded; C goes, two vectors of a row at a time, to a function of the caller's.
//
// A tile of C, kMatmulRows rows by kMatmulColumns columns, stays in registers while k runs: the sum of an element is
// made of chains over kMatmulDepth of k in order, whatever the tile it falls in.
#pragma once

namespace distilbert_fast {
namespace {

constexpr int kMatmulRows = Vec::lanes == 16 ? 12 : Vec::lanes == 8 ? 6 : 4;
constexpr int64_t kMatmulColumns = 2 * Vec::lanes;
constexpr int64_t kMatmulDepth = 256;  // longer chains of float32 sums lose digits

// Element (r, i) of A is data[r · row + i · step].
struct MatmulA {
  const float* data;
  int64_t row, step;
};

// low, high += A B over ``depth`` of k.
template <int R>
inline void matmul_chain(const float* a, int64_t row, int64_t step, const float* b, int64_t b_stride, int64_t depth,
                         Vec (&low)[R], Vec (&high)[R]) {
  for (int64_t i = 0; i < depth; ++i, a += step, b += b_stride) {
    const Vec b_low = load(b), b_high = load(b + Vec::lanes);
    for (int r = 0; r < R; ++r) {
      const Vec x = broadcast(a[r * row]);
      low[r] = fma(x, b_low, low[r]);
      high[r] = fma(x, b_high, high[r]);
    }
  }
}

// The same, added up from 0 first. A function of its own: beside sums of before there are not registers enough, and the
// compiler would leave in memory what the inner loop adds to.
template <int R>
[[gnu::noinline]] void matmul_next_chain(const float* a, int64_t row, int64_t step, const float* b, int64_t b_stride,
                                         int64_t depth, Vec (&low)[R], Vec (&high)[R]) {
  Vec more_low[R], more_high[R];
  for (int r = 0; r < R; ++r) more_low[r] = more_high[r] = broadcast(0);
  matmul_chain<R>(a, row, step, b, b_stride, depth, more_low, more_high);
  for (int r = 0; r < R; ++r) {
    low[r] = add(low[r], more_low[r]);
    high[r] = add(high[r], more_high[r]);
  }
}

template <int R, class Sums, class Out>
inline void matmul_tile(MatmulA a, const float* b, int64_t b_stride, int64_t depth, int64_t row, int64_t column,
                        const Sums& sums, const Out& out) {
  Vec low[R], high[R];
  for (int r = 0; r < R; ++r) sums(row + r, column, low[r], high[r]);
  a.data += row * a.row;
  b += column;
  matmul_chain<R>(a.data, a.row, a.step, b, b_stride, smaller(depth, kMatmulDepth), low, high);
  if (depth <= kMatmulDepth) {
    for (int r = 0; r < R; ++r) out(row + r, column, low[r], high[r]);
    return;
  }
  Vec all_low[R], all_high[R];  // in memory
  for (int r = 0; r < R; ++r) {
    all_low[r] = low[r];
    all_high[r] = high[r];
  }
  for (int64_t i = kMatmulDepth; i < depth; i += kMatmulDepth) {
    matmul_next_chain<R>(a.data + i * a.step, a.row, a.step, b + i * b_stride, b_stride,
                         smaller(depth - i, kMatmulDepth), all_low, all_high);
  }
  for (int r = 0; r < R; ++r) out(row + r, column, all_low[r], all_high[r]);
}

template <int R, class Sums, class Out>
inline void matmul_rows(MatmulA a, int64_t rows, const float* b, int64_t b_stride, int64_t depth, int64_t row,
                        int64_t columns, const Sums& sums, const Out& out) {
  if constexpr (R > 0) {
    if (rows < R) return matmul_rows<R - 1>(a, rows, b, b_stride, depth, row, columns, sums, out);
    for (int64_t j = 0; j < columns; j += kMatmulColumns) {
      matmul_tile<R>(a, b, b_stride, depth, row, j, sums, out);
    }
  }
}

struct FromZero {
  void operator()(int64_t, int64_t, Vec& low, Vec& high) const { low = high = broadcast(0); }
};

// C [rows, columns] = A [rows, depth] · B [depth, columns], columns a multiple of kMatmulColumns. out(row, column, low,
// high) takes C[row, column ...] of kMatmulColumns columns; sums(row, column, low, high) says what the sums begin with.
template <class Out, class Sums = FromZero>
inline void matmul(MatmulA a, int64_t rows, const float* b, int64_t b_stride, int64_t depth, int64_t columns,
                   const Out& out, const Sums& sums = {}) {
  int64_t row = 0;
  for (; row + kMatmulRows <= rows; row += kMatmulRows) {
    matmul_rows<kMatmulRows>(a, kMatmulRows, b, b_stride, depth, row, columns, sums, out);
  }
  matmul_rows<kMatmulRows - 1>(a, rows - row, b, b_stride, depth, row, columns, sums, out);
}

}  // namespace
}  // namespace distilbert_fast
