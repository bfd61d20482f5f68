// Checked entries of the ops: see distilbert_fast/ops/<op>.py for the contract, <op>_rows.h for the arithmetic. They
// throw std::invalid_argument before any memory is touched if sizes, pointers or numbers make no sense.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

class LayerMatches;

void quantize(const QuantizeRows& call, int64_t rows, int threads);

void fit_scale(const FitScaleRows& call, int64_t rows, int threads);

void layer_norm_forward(const LayerNormRows& call, int64_t rows, int threads);
// dweight and dbias are [columns]; call.gradient.sums is not read.
void layer_norm_backward(const LayerNormGradientRows& call, int64_t rows, float* dweight, float* dbias, int threads);

// These throw for an id outside its table too, before any table is touched.
void embedding_forward(const EmbeddingRows& call, int64_t rows, int threads);
void embedding_backward(const EmbeddingGradientRows& call, int64_t rows, float* dweight, float* dbias, int threads);

void cosine_loss_forward(const CosineForwardRows& call, int64_t rows, int threads);
void cosine_loss_backward(const CosineBackwardRows& call, int64_t rows, int threads);

void kl_div_forward(KlDivForward call, bool mean, int threads);
void kl_div_backward(KlDivBackward call, int threads);

// These throw for labels and ids too, before logits or outputs are touched. The slots of the call are made here.
void linear_kl_div(LinearKlDivRows call, int threads);
void linear_topk_kl_div(LinearTopKKlDivRows call, int threads);

struct Int8Linear {
  const int8_t* x;  // codes [rows, k]
  int64_t x_row_stride, x_column_stride;
  const float* x_scale;  // [rows], or one value by stride 0
  int64_t x_scale_stride;
  Weights kind;         // int8 or codebook16
  const uint8_t* blob;  // from pack_linear; the scales and biases in it are not read
  int64_t blob_bytes;
  const float* scale;  // [columns]
  const float* bias;   // [columns] or null
  int64_t rows, columns, k;
  bool gelu;
  const void* residual;  // [rows, columns] or null
  int64_t residual_stride;
  bool residual_is_bfloat16;
  void* out;   // [rows, columns], contiguous
  int output;  // 0 float32, 1 bfloat16, 2 codes
  const float* out_scale;
  int64_t out_scale_stride;
  const LayerMatches* matches;  // of the blob, or null
};

void int8_linear(const Int8Linear& call, int threads);

// The products of a linear layer, forward and backward: out [rows, columns] = A [rows, k] · Bᵀ + bias, B [columns, k].
// Element (r, i) of A lies at a[r · a_row + i · a_step], of B likewise; one stride of each is 1. In float32 if all
// three are; else what is not yet bfloat16 is rounded to it, and sums are float32: that takes a tier that multiplies
// bfloat16.
struct LinearProduct {
  const void* a;
  DType a_dtype;
  int64_t a_row, a_step;
  const void* b;
  DType b_dtype;
  int64_t b_row, b_step;
  const float* bias;  // [columns] or null
  int64_t rows, columns, k;
  void* out;  // contiguous
  DType out_dtype;
  bool add;  // to what out holds
};

// Whether the tier in use has products of bfloat16.
bool multiplies_bfloat16();

void linear_product(const LinearProduct& call, int threads);

}  // namespace distilbert_fast
