// The CPU kernels and the table through which a tier of them is reached.
//
// A kernel is written once, over the vector type of vec_<isa>.h, and compiled once per tier in tier_<isa>.cpp with
// that tier's flags. Everything those files share has internal linkage: of two inline functions of one name the linker
// keeps either, and the AVX-512 one would crash the rest of the world.
#pragma once

#include <cstdint>

#include "cpu/gemm/gemm.h"
#include "cpu/ops/rows.h"

namespace distilbert_fast {

// Two matrices of logits [rows, columns]; neighbours inside a row touch, rows lie a stride (in elements) apart.
struct KlDivLogits {
  const void* student;
  const void* teacher;
  int64_t student_stride;
  int64_t teacher_stride;
  DType student_dtype;
  DType teacher_dtype;
  const bool* mask;  // [rows], true = counted; null counts all
  int64_t rows;
  int64_t columns;
  double temperature;
};

struct KlDivForward {
  KlDivLogits logits;
  double gradient_scale;  // 1 / counted rows for a mean, else 1
  float* loss;            // [rows]
  float* stats;           // [rows, 4]: max and Z = Σ exp((x − max)/τ) of student and of teacher; or null
  void* gradient;         // [rows, columns] contiguous, dtype of the student; or null
  bool stream;            // the gradient is larger than the caches: write around them
};

struct KlDivBackward {
  KlDivLogits logits;
  const float* dloss;  // [rows]
  const float* stats;  // [rows, 4]
  void* gradient;      // as above
  bool stream;
};

// A student's logits for the two vocabulary losses. Rows [0, kl_rows) count for the KL, and only they have a teacher.
struct VocabularyLosses {
  void* student;  // [rows, columns]; where gradients are wanted the rows of the KL become its gradient
  DType student_dtype;
  int64_t rows;
  int64_t kl_rows;
  int64_t columns;
  double temperature;
  const int64_t* labels;  // [rows], −1 = does not count for the cross-entropy; null: none does
  const int64_t* slots;   // [rows], the row of ce_gradient
  bool gradient;
  float* kl;          // [kl_rows]
  float* ce;          // [rows]; null if labels is
  void* ce_gradient;  // [rows with a label, columns], dtype of the student; null: not wanted
};

struct LinearKlDivRows {
  VocabularyLosses losses;
  const void* teacher;  // [kl_rows, columns]
  DType teacher_dtype;
};

// The teacher is known by its most likely tokens. Rows of the KL are written over even where no gradient is wanted.
struct LinearTopKKlDivRows {
  VocabularyLosses losses;
  const int64_t* ids;     // [kl_rows, kept], in [0, columns)
  const float* log_p;     // [kl_rows, kept]
  const float* log_tail;  // [kl_rows], the log of all other tokens' mass
  int64_t kept;
};

// Which tokens form a sequence. Packed: sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] − 1. Padded, where
// cu_seqlens is null: `length` tokens each, of which those with mask[b · length + i] count; a null mask counts all.
// Packed sequences may have queries that are nobody's keys, as transformers computes at padding: the tokens
// cu_queries[b] to cu_queries[b + 1] − 1. Only forward knows them.
struct AttentionSequences {
  const int32_t* cu_seqlens;  // [batch + 1]
  const bool* mask;           // [batch, length]
  int64_t length;
  int64_t batch;
  const int32_t* cu_queries = nullptr;  // [batch + 1]; null: none
};

// Token i (of all if packed, of sequence b if padded) of head h lies at data + b · sequence + i · token + h · head, in
// elements; the head_size numbers of a head touch. Packed tensors have sequence = 0.
template <class Pointer>
struct AttentionTensor {
  Pointer data;
  int64_t sequence, token, head;
};

struct AttentionCall {
  AttentionTensor<const void*> q, k, v;
  DType dtype;  // of q, k and v
  AttentionSequences sequences;
  int64_t heads, head_size;
  const float* head_mask;    // [batch, heads]; null: 1
  int64_t head_mask_stride;  // from one sequence to the next, 0 for a mask [heads]
  double scale;
  double dropout_p;  // in [0, 1)
  uint64_t seed;     // of the dropout
};

struct AttentionForward {
  AttentionCall call;
  AttentionTensor<void*> o;  // 0 at padding and where the head mask is 0
  DType o_dtype;
};

struct AttentionBackward {
  AttentionCall call;
  AttentionTensor<const void*> g;     // d loss / d o, dtype of the call
  AttentionTensor<void*> dq, dk, dv;  // dtype of the call; 0 at padding and where the head mask is 0
  float* dm;                          // [batch, heads], zeros on entry; also where the head mask is 0; null: not wanted
};

// Element (r, i) at data[r · row + i · step]; one of the strides is 1.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t row, step;
};

using PackPanels = void(const Matrix& b, int64_t columns, int64_t k, void* out);
using CopyRows = void(const Matrix& a, int64_t rows, int64_t k, void* out, int64_t stride_bytes);

// y = x Wᵀ + bias of rows whose neighbours touch, W[f, c] = codebook[f / group, code (f, c)]. The codes are below
// `values`; code c of a row is in its bits [c · bits, (c + 1) · bits), counted from the lowest of each byte.
struct CodebookLinear {
  const void* x;  // [rows, depth]
  int64_t x_stride;
  DType dtype;           // of x and y
  const uint8_t* codes;  // [columns, bytes]
  int64_t codes_stride;
  int64_t bits;           // 4, 6 or 8
  const float* codebook;  // [groups, values]
  int64_t values;         // at most 256
  int64_t group;          // columns that share a codebook
  const float* bias;      // [columns], or null
  int64_t rows, columns, depth;
  void* y;                    // [rows, columns] contiguous
  int64_t block_rows = 0;     // a block of y is made of so many rows, or the last ones,
  int64_t block_columns = 0;  // and columns; the entry says of how many
};

constexpr int64_t kCodebookRows = 12;     // of x that a kernel widens at a time, at most
constexpr int64_t kCodebookColumns = 16;  // whose codes it unpacks at a time: a cache line of each in the first cache

// Code k of a row, where it ends before its last byte does.
inline uint8_t code_at(const uint8_t* row, int64_t bits, int64_t k) {
  if (bits == 8) return row[k];
  const int64_t bit = k * bits, shift = bit % 8;
  const int low = row[bit / 8] >> shift;
  const int high = shift + bits > 8 ? row[bit / 8 + 1] << (8 - shift) : 0;
  return static_cast<uint8_t>((low | high) & ((1 << bits) - 1));
}

// The checked entry: throws std::invalid_argument before it touches y or follows a code.
void codebook_linear(CodebookLinear call, int threads);

// One entry per kernel; each works on the rows [begin, end), attention on the pairs sequence · heads + head.
struct Kernels {
  void (*kl_div_forward)(const KlDivForward&, int64_t begin, int64_t end);
  void (*kl_div_backward)(const KlDivBackward&, int64_t begin, int64_t end);
  void (*linear_kl_div)(const LinearKlDivRows&, int64_t begin, int64_t end);
  // scratch: 2 · kept doubles, one for each thread.
  void (*linear_topk_kl_div)(const LinearTopKKlDivRows&, int64_t begin, int64_t end, void* scratch);
  GemmKernel gemm_int8;
  GemmKernel gemm_codebook16;
  GemmKernel gemm_bfloat16;
  GemmKernel gemm_float32;
  // Of float32 for gemm_float32; of float32 or bfloat16 for a gemm_bfloat16 that reads bfloat16, else null.
  PackPanels* pack_panels;
  PackPanels* pack_pair_panels;
  CopyRows* copy_rows;
  CopyRows* copy_pair_rows;
  // The matches of a PackedLinear, of [begin, end) of its columns, eight at a time; null: none are read. The scratch is
  // gemm_scratch_bytes large.
  void (*match_groups)(const PackedLinear&, int64_t begin, int64_t end, uint8_t* scratch, uint32_t* matches);
  uint8_t code_flip;    // int8 activations are kept XOR this
  bool reads_bfloat16;  // gemm_bfloat16 takes bfloat16 activations, not float32
  void (*quantize)(const QuantizeRows&, int64_t begin, int64_t end);
  void (*fit_scale)(const FitScaleRows&, int64_t begin, int64_t end);
  void (*layer_norm_forward)(const LayerNormRows&, int64_t begin, int64_t end);
  // scratch: attention_forward_scratch or _backward_scratch bytes for the longest sequence, 64 byte aligned, one for
  // each thread.
  void (*attention_forward)(const AttentionForward&, int64_t begin, int64_t end, void* scratch);
  void (*attention_backward)(const AttentionBackward&, int64_t begin, int64_t end, void* scratch);
  void (*embedding_forward)(const EmbeddingRows&, int64_t begin, int64_t end);
  void (*add_coded_rows)(const CodedRows&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormGradientRows&, int64_t begin, int64_t end);
  void (*embedding_backward)(const EmbeddingGradientRows&, int64_t begin, int64_t end);
  void (*cosine_loss_forward)(const CosineForwardRows&, int64_t begin, int64_t end);
  void (*cosine_loss_backward)(const CosineBackwardRows&, int64_t begin, int64_t end);
  // Blocks [begin, end) of y. scratch: depth · (4 · (block_columns + kCodebookRows) + kCodebookColumns) bytes, one for
  // each thread.
  void (*codebook_linear)(const CodebookLinear&, int64_t begin, int64_t end, void* scratch);
};

extern const Kernels kernels_scalar;
#ifndef DISTILBERT_FAST_SCALAR_ONLY
extern const Kernels kernels_avx2;
extern const GemmKernel gemm_int8_avx_vnni;  // of a tier that else is avx2
extern const GemmKernel gemm_codebook16_avx_vnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;
#endif

}  // namespace distilbert_fast
