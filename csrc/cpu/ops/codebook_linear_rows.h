// codebook_linear on blocks of rows by columns:   W = codebook[codes],   y = x Wᵀ + bias.
//
// Pass 1 follows the codes of a block through the table into scratch, as B [depth, columns] of matmul.h: of the weights
// only these bytes are read from memory, and what is multiplied stays in the second cache. Pass 2 lets the rows of x
// pass by, bfloat16 ones widened a few at a time. Sums are float32 and rounded once, after the bias.
#pragma once

namespace distilbert_fast {
namespace {

static_assert(kMatmulRows <= kCodebookRows, "scratch is too small");

// All codes of a row, a byte each.
inline const uint8_t* unpacked(const CodebookLinear& call, const uint8_t* row, uint8_t* out) {
  if (call.bits == 8) return row;
  const int64_t depth = call.depth, whole = call.bits == 4 ? depth / 2 * 2 : depth / 4 * 4;
  for (int64_t k = 0; call.bits == 4 && k < whole; k += 2, ++row) {
    out[k] = *row & 15;
    out[k + 1] = *row >> 4;
  }
  for (int64_t k = 0; call.bits == 6 && k < whole; k += 4, row += 3) {
    for (int64_t i = 0; i < 4; ++i) out[k + i] = code_at(row, 6, i);
  }
  for (int64_t k = whole; k < depth; ++k) out[k] = code_at(row, call.bits, k - whole);
  return out;
}

// Columns up to `padded`, whole vectors, are zeros.
inline void expand_codes(const CodebookLinear& call, int64_t first, int64_t columns, int64_t padded, float* out,
                         uint8_t* bytes) {
  for (int64_t column = 0; column < columns; column += kCodebookColumns) {
    const int64_t some = smaller(kCodebookColumns, columns - column);
    const uint8_t* codes[kCodebookColumns];
    const float* codebooks[kCodebookColumns];
    for (int64_t c = 0; c < some; ++c) {
      const int64_t f = first + column + c;
      codes[c] = unpacked(call, call.codes + f * call.codes_stride, bytes + c * call.depth);
      codebooks[c] = call.codebook + f / call.group * call.values;
    }
    for (int64_t k = 0; k < call.depth; ++k) {
      float* to = out + k * padded + column;
      for (int64_t c = 0; c < some; ++c) to[c] = codebooks[c][codes[c][k]];
    }
  }
  for (int64_t k = 0; k < call.depth; ++k) {
    for (int64_t c = columns; c < padded; ++c) out[k * padded + c] = 0;
  }
}

inline void widen_row(const bfloat16* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + Vec::lanes <= n; i += Vec::lanes) store(out + i, load(x + i));
  if (i < n) store_first(out + i, load_first(x + i, n - i, 0), n - i);
}

template <class T>
void codebook_linear_block(const CodebookLinear& call, int64_t row, int64_t rows, int64_t first, int64_t columns,
                           float* scratch) {
  const int64_t padded = (columns + kMatmulColumns - 1) / kMatmulColumns * kMatmulColumns;
  float* const widened = scratch + call.depth * padded;
  expand_codes(call, first, columns, padded, scratch, reinterpret_cast<uint8_t*>(widened + call.depth * kCodebookRows));
  const auto put = [&](T* y, int64_t column, Vec sums) {
    const int64_t n = columns - column;
    if (n <= 0) return;
    const float* bias = call.bias + first + column;
    if (call.bias != nullptr) sums = add(sums, n >= Vec::lanes ? load(bias) : load_first(bias, n, 0));
    n >= Vec::lanes ? store(y + column, sums) : store_first(y + column, sums, n);
  };
  for (const int64_t end = row + rows; row < end; row += kMatmulRows) {
    const int64_t some = smaller(kMatmulRows, end - row);
    const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
    MatmulA a = {widened, call.depth, 1};
    if constexpr (sizeof(T) == sizeof(float)) {
      a = {x, call.x_stride, 1};
    } else {
      for (int64_t r = 0; r < some; ++r) widen_row(x + r * call.x_stride, call.depth, widened + r * call.depth);
    }
    T* y = static_cast<T*>(call.y) + row * call.columns + first;
    matmul(a, some, scratch, padded, call.depth, padded, [&](int64_t r, int64_t column, Vec low, Vec high) {
      put(y + r * call.columns, column, low);
      put(y + r * call.columns, column + Vec::lanes, high);
    });
  }
}

// Blocks [begin, end): those of the same columns are neighbours.
inline void codebook_linear(const CodebookLinear& call, int64_t begin, int64_t end, void* scratch) {
  const auto block = call.dtype == DType::float32 ? codebook_linear_block<float> : codebook_linear_block<bfloat16>;
  const int64_t blocks_of_rows = (call.rows + call.block_rows - 1) / call.block_rows;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i % blocks_of_rows * call.block_rows, column = i / blocks_of_rows * call.block_columns;
    block(call, row, smaller(call.block_rows, call.rows - row), column,
          smaller(call.block_columns, call.columns - column), static_cast<float*>(scratch));
  }
}

}  // namespace
}  // namespace distilbert_fast
