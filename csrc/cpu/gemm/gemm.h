// Linear layers on packed weights: y = epilogue(A · Wᵀ), A [rows, K], W [F, K].
//
// Everything is counted in groups of 32 bits along K: four int8, two bfloat16 or one float. Weights lie in panels of 32
// columns, a panel in blocks of 16 groups, a block in two halves of 16 columns:
//
//     panel [K blocks] [2 halves] [16 groups] [16 columns] of 32 bits
//
// One half of a block is one AMX tile, one (half, group) is one zmm register, half of it a ymm: every tier reads the
// same bytes. Columns and K are padded with zeros. Behind the panels stand, for each column (padded to whole panels),
// the sum of its int8 weights, its scale and its bias: one blob holds a layer.
//
// int8 weights of which four columns in a row have but 16 values are kept as codes of 4 bits (codebook16): a byte
// holds, in its lower bits, the code of the weight that else is there in the first half, and in its upper bits that of
// the second half.
//
//     panel [K blocks] [16 groups] [16 columns] of 32 bits
//
// After the panels come the tables [F padded / 4] [16] of int8, then the rest. K is whole blocks.
#pragma once

#include <cstdint>

namespace distilbert_fast {

enum class Weights : int { int8 = 0, bfloat16 = 1, float32 = 2, codebook16 = 3 };

// Whether activations meet such weights as int8 codes.
constexpr bool reads_codes(Weights kind) { return kind == Weights::int8 || kind == Weights::codebook16; }

constexpr int64_t kPanelColumns = 32;
constexpr int64_t kRowUnit = 32;
constexpr int64_t kHalfBytes = 1024;
constexpr int64_t kBlockBytes = 2 * kHalfBytes;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t block_elements(Weights kind) {  // K of one block
  return reads_codes(kind) ? 64 : kind == Weights::bfloat16 ? 32 : 16;
}
constexpr int64_t block_bytes(Weights kind) { return kind == Weights::codebook16 ? kBlockBytes / 2 : kBlockBytes; }

// Of a column, in a panel of other weights than codebook16: where its first group lies.
constexpr int64_t place_in_panel(int64_t column) { return column % kPanelColumns / 16 * kHalfBytes + column % 16 * 4; }

struct PackedLinear {
  Weights kind;
  const uint8_t* panels;
  const int32_t* column_sums;  // [F padded] Σ_k w, of int8 and codebook16 only, as scale
  const float* scale;          // [F padded]
  const float* bias;           // [F padded]
  int64_t blocks;              // of a panel
  int64_t columns;             // F
  // Of a tier that multiplies by vpmaddubsw, see gemm_tile_int8_avx2.h: [F padded / 8, match_words(blocks)]. Null:
  // none.
  const uint32_t* matches = nullptr;
  const uint8_t* tables = nullptr;  // [F padded / 4, 16] of int8, codebook16 only

  const uint8_t* panel(int64_t i) const { return panels + i * panel_bytes(); }
  const uint8_t* tables_at(int64_t column) const { return tables + column * 4; }
  int64_t panel_bytes() const { return blocks * block_bytes(kind); }
  int64_t panel_count() const { return (columns + kPanelColumns - 1) / kPanelColumns; }
};

enum class Activation : int {
  none,
  gelu,       // x Φ(x), Φ by an absolute error of 2e-8
  gelu_fast,  // Φ by an absolute error of 4e-5: for a result that is quantized to int8 next
};

enum class Output : int { float32, bfloat16, codes };

// K blocks [begin, end): those of masked heads are left out.
struct BlockRange {
  int32_t begin, end;
};

// Rows of A end with zeros up to whole blocks: codes (XOR the tier's code_flip) for int8 weights, else what the tier
// reads. A kernel may read, and not use, rows of A behind the last one, up to a multiple of kRowUnit from the first.
struct Gemm {
  PackedLinear weights;
  const uint8_t* a;
  int64_t a_stride;        // bytes
  const float* a_scale;    // int8 only: scales of the rows
  int64_t a_scale_stride;  // 1, or 0 for one scale in all
  Activation activation;
  const void* residual;  // [rows, F] added after the activation; null adds nothing
  int64_t residual_stride;
  bool residual_is_bfloat16;
  void* out;           // [rows, F]; may be the residual's own memory
  int64_t out_stride;  // elements
  Output output;
  const float* out_scale;  // for codes: of the rows
  int64_t out_scale_stride;
  uint8_t out_flip;          // codes are stored XOR this
  const BlockRange* blocks;  // what of K to read
  int64_t block_ranges;
  const int32_t* panels;     // which panels to compute; null: all
  const float* out_factors;  // for codes: of the columns [F padded], what y is multiplied by instead of 1 / out_scale
  int64_t next_panel = -1;   // place in the list of what comes after this call, fetched meanwhile; −1: nothing
};

// Rows [row_begin, row_end) in panels [panel_begin, panel_end) of the list. The scratch is gemm_scratch_bytes large.
using GemmKernel = void (*)(const Gemm&, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                            uint8_t* scratch);

// Of eight columns: what their sums start from, how many matches, 32 bits for each of these and 16 for each group.
inline int64_t match_words(int64_t blocks) { return 8 + 1 + 8 * blocks + 8 * blocks; }

// A panel of codes, looked up. Eight columns, doubled, and their matches: see gemm_tile_int8_avx2.h.
inline int64_t gemm_scratch_bytes(Weights kind, int64_t blocks) {
  const int64_t panel = kind == Weights::codebook16 ? blocks * kBlockBytes : 0;
  return 64 + panel + 16 * blocks * 64 + 4 * match_words(blocks);
}

}  // namespace distilbert_fast
