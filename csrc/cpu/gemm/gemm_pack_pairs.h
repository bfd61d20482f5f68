// Matrices as the kernels of gemm.h that multiply pairs of bfloat16 read them, made anew with every call: panels of
// weights, and rows that end with zeros. float32 is rounded on the way. For tiers with AVX-512.
#pragma once

namespace distilbert_fast {
namespace {

constexpr int64_t kPairBlock = 32;  // bfloat16 numbers of a block of K

inline int64_t pair_blocks(int64_t n) { return (n + kPairBlock - 1) / kPairBlock; }

// 32 numbers of a row, as bfloat16; zeros behind the first n.
inline __m512i load_pairs(const bfloat16* x, int64_t n) {
  if (n >= kPairBlock) return _mm512_loadu_si512(x);
  return n <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), x);
}
inline __m256i narrow_first(const float* x, int64_t n) {
  return n >= 16 ? narrow(load(x)) : n <= 0 ? _mm256_setzero_si256() : narrow(load_first(x, n, 0));
}
inline __m512i load_pairs(const float* x, int64_t n) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_first(x, n)), narrow_first(x + 16, n - 16), 1);
}

// 16 numbers of a row, as bfloat16 in the lower halves of 32 bits; zeros behind the first n.
inline __m512i load_halves(const bfloat16* x, int64_t n) {
  if (n <= 0) return _mm512_setzero_si512();
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(n >= 16 ? 0xffff : first(n), x));
}
inline __m512i load_halves(const float* x, int64_t n) { return _mm512_cvtepu16_epi32(narrow_first(x, n)); }

// Sixteen rows are more streams than the processor itself keeps ahead of.
template <class T>
inline void prefetch_block(const T* x) {
  for (int64_t i = 0; i < kPairBlock; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + i);
}

// A square of 16 groups by 16: pairs(i) are the 16 pairs of row i, which becomes column i.
template <class Pairs>
inline void transpose_pairs(const Pairs& pairs, Vec (&square)[16]) {
  for (int64_t i = 0; i < 16; ++i) square[i].v = _mm512_castsi512_ps(pairs(i));
  transpose(square);
}

// Numbers 2g and 2g + 1 of 16 columns side by side: halves(i) are number i of each.
template <class Halves>
inline __m512i join_halves(const Halves& halves, int64_t g) {
  return _mm512_or_si512(halves(2 * g), _mm512_slli_epi32(halves(2 * g + 1), 16));
}

// Half a block of a panel: 16 columns whose numbers touch.
template <class Pairs>
inline void pack_touching_half(const Pairs& pairs, uint8_t* out) {
  Vec square[16];
  transpose_pairs(pairs, square);
  for (int64_t g = 0; g < 16; ++g) store(reinterpret_cast<float*>(out + g * 64), square[g]);
}

// Half a block of a panel: 16 columns that touch one another.
template <class Halves>
inline void pack_crossing_half(const Halves& halves, uint8_t* out) {
  for (int64_t g = 0; g < 16; ++g) _mm512_storeu_si512(out + g * 64, join_halves(halves, g));
}

// `columns` rows of B as panels. Rows of memory are read from end to end: along K, or across all panels.
template <class T>
void pack_pair_panels_of(const T* b, int64_t row, int64_t step, int64_t columns, int64_t k, uint8_t* out) {
  const int64_t blocks = pair_blocks(k < 1 ? 1 : k), end = round_up(columns, kPanelColumns);
  const auto half_at = [&](int64_t column, int64_t block) {
    return out + (column / kPanelColumns * blocks + block) * kBlockBytes + column % kPanelColumns / 16 * kHalfBytes;
  };
  if (step == 1) {
    for (int64_t column = 0; column < end; column += 16) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t j = block * kPairBlock;
        const auto pairs = [&](int64_t i) {
          prefetch_block(b + (column + i) * row + j + 8 * kPairBlock);
          return load_pairs(b + (column + i) * row + j, column + i < columns ? k - j : 0);
        };
        pack_touching_half(pairs, half_at(column, block));
      }
    }
    return;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t column = 0; column < end; column += 16) {
      const auto halves = [&](int64_t i) {
        const int64_t j = block * kPairBlock + i;
        __builtin_prefetch(b + (j + kPairBlock) * step + column);
        return load_halves(b + j * step + column, j < k ? columns - column : 0);
      };
      pack_crossing_half(halves, half_at(column, block));
    }
  }
}

inline void pack_pair_panels(const Matrix& b, int64_t columns, int64_t k, void* out) {
  const auto pack = [&](const auto* data) {
    pack_pair_panels_of(data, b.row, b.step, columns, k, static_cast<uint8_t*>(out));
  };
  b.dtype == DType::float32 ? pack(static_cast<const float*>(b.data)) : pack(static_cast<const bfloat16*>(b.data));
}

// Rows [rows, k] of A at a stride, with zeros behind column k.
template <class T>
void copy_pair_rows_of(const T* a, int64_t row, int64_t step, int64_t rows, int64_t k, uint8_t* out, int64_t stride) {
  if (step == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; 2 * j < stride; j += kPairBlock) {
        _mm512_storeu_si512(out + r * stride + 2 * j, load_pairs(a + r * row + j, k - j));
      }
    }
    return;
  }
  for (int64_t j = 0; 2 * j < stride; j += kPairBlock) {
    for (int64_t r = 0; r < rows; r += 16) {
      const auto halves = [&](int64_t i) { return load_halves(a + (j + i) * step + r, j + i < k ? rows - r : 0); };
      Vec square[16];
      transpose_pairs([&](int64_t g) { return join_halves(halves, g); }, square);
      for (int64_t i = 0; i < 16 && r + i < rows; ++i) {
        store(reinterpret_cast<float*>(out + (r + i) * stride + 2 * j), square[i]);
      }
    }
  }
}

inline void copy_pair_rows(const Matrix& a, int64_t rows, int64_t k, void* out, int64_t stride) {
  const auto copy = [&](const auto* data) {
    copy_pair_rows_of(data, a.row, a.step, rows, k, static_cast<uint8_t*>(out), stride);
  };
  a.dtype == DType::float32 ? copy(static_cast<const float*>(a.data)) : copy(static_cast<const bfloat16*>(a.data));
}

}  // namespace
}  // namespace distilbert_fast
