// Float matrices as the kernels of gemm.h read them, made anew with every call: panels of weights, and rows that end
// with zeros. Of a matrix whose rows touch and of one whose columns do.
#pragma once

namespace distilbert_fast {
namespace {

// From lanes rows of a matrix, columns [j, j + lanes); zeros beyond its `rows` and its `k`.
inline void load_square(const float* x, int64_t stride, int64_t row, int64_t rows, int64_t j, int64_t k,
                        Vec (&square)[Vec::lanes]) {
  for (int64_t r = 0; r < Vec::lanes; ++r) {
    const float* from = x + (row + r) * stride + j;
    if (row + r >= rows || j >= k) {
      square[r] = broadcast(0);
    } else {
      square[r] = j + Vec::lanes <= k ? load(from) : load_first(from, k - j, 0);
    }
  }
}

// `columns` rows of B as panels: [K blocks] [2 halves] [16] [16 columns]. Rows of memory are read from end to end:
// along K, or across all panels.
inline void pack_panels(const Matrix& b, int64_t columns, int64_t k, void* out) {
  constexpr int64_t lanes = Vec::lanes, half_floats = kHalfBytes / 4;
  const float* const data = static_cast<const float*>(b.data);
  const int64_t end = round_up(k < 1 ? 1 : k, 16), all_columns = round_up(columns, kPanelColumns);
  const auto place = [&](int64_t i, int64_t column) {
    const int64_t half = (column / kPanelColumns * (end / 16) + i / 16) * 2 + column % kPanelColumns / 16;
    return static_cast<float*>(out) + half * half_floats + i % 16 * 16 + column % 16;
  };
  if (b.step == 1) {
    for (int64_t column = 0; column < all_columns; column += lanes) {
      for (int64_t j = 0; j < end; j += lanes) {
        Vec square[lanes];
        load_square(data, b.row, column, columns, j, k, square);
        transpose(square);
        for (int64_t r = 0; r < lanes; ++r) store(place(j + r, column), square[r]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < end; ++i) {
    for (int64_t column = 0; column < all_columns; column += lanes) {
      const float* from = data + i * b.step + column;
      const int64_t left = i < k ? columns - column : 0;
      store(place(i, column), left >= lanes ? load(from) : left > 0 ? load_first(from, left, 0) : broadcast(0));
    }
  }
}

// Rows [rows, k] of A at a stride, with zeros behind column k.
inline void copy_rows(const Matrix& a, int64_t rows, int64_t k, void* memory, int64_t stride_bytes) {
  constexpr int64_t lanes = Vec::lanes;
  const float* const data = static_cast<const float*>(a.data);
  float* const out = static_cast<float*>(memory);
  const int64_t stride = stride_bytes / 4;
  if (a.step == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < stride; j += lanes) {
        const float* from = data + r * a.row + j;
        store(out + r * stride + j, j + lanes <= k ? load(from) : j < k ? load_first(from, k - j, 0) : broadcast(0));
      }
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += lanes) {
    for (int64_t j = 0; j < stride; j += lanes) {
      Vec square[lanes];
      load_square(data, a.step, j, k, r, rows, square);  // of [k, rows], whose rows touch
      transpose(square);
      for (int64_t i = 0; i < lanes && r + i < rows; ++i) store(out + (r + i) * stride + j, square[i]);
    }
  }
}

}  // namespace
}  // namespace distilbert_fast
