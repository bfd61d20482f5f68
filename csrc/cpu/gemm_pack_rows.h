// Float matrices as the kernels of gemm.h read them, made anew with every call: panels of weights, and rows that end
// with zeros. Of a matrix whose rows touch and of one whose columns do. Included after vec_<isa>.h.
#pragma once

namespace distilbert_fast {
namespace {

// From lanes rows of a matrix, columns [j, j + lanes); zeros beyond its `rows` and its `k`.
inline void load_square(const FloatMatrix& x, int64_t row, int64_t rows, int64_t j, int64_t k,
                        Vec (&square)[Vec::lanes]) {
  for (int64_t r = 0; r < Vec::lanes; ++r) {
    const float* from = x.data + (row + r) * x.row + j;
    if (row + r >= rows || j >= k) {
      square[r] = broadcast(0);
    } else {
      square[r] = j + Vec::lanes <= k ? load(from) : load_first(from, k - j, 0);
    }
  }
}

// `columns` rows of B, at most 32, as one panel: [K blocks] [2 halves] [16] [16 columns].
inline void pack_panel(const FloatMatrix& b, int64_t columns, int64_t k, float* out) {
  constexpr int64_t lanes = Vec::lanes, half_floats = kHalfBytes / 4;
  const auto place = [&](int64_t i, int64_t column) {
    return out + (i / 16 * 2 + column / 16) * half_floats + i % 16 * 16 + column % 16;
  };
  const int64_t end = round_up(k < 1 ? 1 : k, 16);
  if (b.step == 1) {
    for (int64_t column = 0; column < kPanelColumns; column += lanes) {
      for (int64_t j = 0; j < end; j += lanes) {
        Vec square[lanes];
        load_square(b, column, columns, j, k, square);
        transpose(square);
        for (int64_t r = 0; r < lanes; ++r) store(place(j + r, column), square[r]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < end; ++i) {
    for (int64_t column = 0; column < kPanelColumns; column += lanes) {
      const float* from = b.data + i * b.step + column;
      const int64_t left = i < k ? columns - column : 0;
      store(place(i, column), left >= lanes ? load(from) : left > 0 ? load_first(from, left, 0) : broadcast(0));
    }
  }
}

// Rows [rows, k] of A at a stride, with zeros behind column k.
inline void copy_rows(const FloatMatrix& a, int64_t rows, int64_t k, float* out, int64_t stride) {
  constexpr int64_t lanes = Vec::lanes;
  if (a.step == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < stride; j += lanes) {
        const float* from = a.data + r * a.row + j;
        store(out + r * stride + j, j + lanes <= k ? load(from) : j < k ? load_first(from, k - j, 0) : broadcast(0));
      }
    }
    return;
  }
  const FloatMatrix columns = {a.data, a.step, 1};  // [k, rows], whose rows touch
  for (int64_t r = 0; r < rows; r += lanes) {
    for (int64_t j = 0; j < stride; j += lanes) {
      Vec square[lanes];
      load_square(columns, j, k, r, rows, square);
      transpose(square);
      for (int64_t i = 0; i < lanes && r + i < rows; ++i) store(out + (r + i) * stride + j, square[i]);
    }
  }
}

}  // namespace
}  // namespace distilbert_fast
