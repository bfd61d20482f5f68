// Launchers of the ops on a GPU: see distilbert_fast/ops/<op>.py for the contract, <op>.cu for the arithmetic. No CUDA
// header is needed to call them.
//
// They queue their kernels on `stream` of `device` and return; nothing waits, so a graph can capture them. They throw
// std::invalid_argument if an argument makes no sense, std::runtime_error if CUDA refuses.
#pragma once

#include <cstdint>

namespace distilbert_fast {

struct KlDivLogits {
  const void* student;  // [rows, columns], rows student_stride elements apart
  const void* teacher;  // [rows, columns], rows teacher_stride elements apart
  int64_t student_stride;
  int64_t teacher_stride;
  int student_dtype;  // 0 float32, 1 bfloat16, 2 float16
  int teacher_dtype;
  const bool* mask;  // [rows], true = counted; null counts all
  int64_t rows;
  int64_t columns;
  double temperature;
};

struct KlDivForward {
  KlDivLogits logits;
  const float* scale;  // one number on the device that multiplies the gradient
  float* loss;         // [rows], not scaled
  float* stats;        // [rows, 4]: max and Z = Σ exp((x − max)/τ) of student and of teacher; null = not wanted
  void* gradient;      // [rows, columns] of the student's dtype; null = not wanted
};

struct KlDivBackward {
  KlDivLogits logits;
  const float* dloss;  // [rows]
  const float* stats;  // [rows, 4], of the forward pass
  void* gradient;      // [rows, columns] of the student's dtype
};

void kl_div_forward(const KlDivForward& call, int device, void* stream);
void kl_div_backward(const KlDivBackward& call, int device, void* stream);

struct LayerNorm {
  const void* x;  // [rows, columns], rows x_stride elements apart
  int64_t x_stride;
  const void* residual;  // [rows, columns], rows residual_stride elements apart; null adds nothing
  int64_t residual_stride;
  int dtype;            // of x, residual and y: 0 float32, 1 bfloat16, 2 float16
  const void* weight;   // [columns]
  const void* bias;     // [columns]
  int parameter_dtype;  // of weight and bias: float32, or that of x
  int64_t rows;
  int64_t columns;
  double eps;
  void* y;                // [rows, columns]
  float* mean;            // [rows]; null = not wanted
  float* rstd;            // [rows]; null = not wanted
  int8_t* codes;          // [rows, columns], of y before it is rounded; null = not wanted
  float* scale_out;       // [rows]: each row's own scale; null: scale_in is used
  const float* scale_in;  // one a row (scale_in_stride 1) or one in all (0)
  int64_t scale_in_stride;
};

void layer_norm(const LayerNorm& call, int device, void* stream);

struct Int8Linear {
  const int8_t* x;  // [rows, depth], rows x_stride elements apart
  int64_t x_stride;
  const float* x_scale;  // one a row (x_scale_stride 1) or one in all (0)
  int64_t x_scale_stride;
  const int8_t* w;  // [columns, depth], rows w_stride elements apart
  int64_t w_stride;
  const float* w_scale;  // [columns]
  const void* bias;      // [columns]; null adds nothing
  int bias_dtype;        // 0 float32, 1 bfloat16, 2 float16
  int64_t rows;
  int64_t columns;
  int64_t depth;
  bool gelu;
  const void* residual;  // [rows, columns], rows residual_stride elements apart; null adds nothing
  int64_t residual_stride;
  int residual_dtype;
  void* y;                 // [rows, columns]
  int y_dtype;             // of the three, or 3 int8
  const float* out_scale;  // of codes: one a row (out_scale_stride 1) or one in all (0)
  int64_t out_scale_stride;
};

void int8_linear(const Int8Linear& call, int device, void* stream);

// Which tokens form a sequence. Packed: sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] − 1 of `tokens`.
// Padded, where cu_seqlens is null: `length` tokens each, of which those with mask[b · length + i] count; a null mask
// counts all.
struct AttentionSequences {
  const int32_t* cu_seqlens;  // [batch + 1], on the device: what it holds is cut to 0 … tokens where it is read
  const bool* mask;           // [batch, length]
  int64_t tokens;
  int64_t length;
  int64_t batch;
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
  int dtype;  // of q, k, v, o and their gradients: 1 bfloat16, 2 float16
  AttentionSequences sequences;
  int64_t heads, head_size;
  const float* head_mask;    // [batch, heads]; null: 1
  int64_t head_mask_stride;  // from one sequence to the next, 0 for a mask [heads]
  bool every_head;           // compute heads of mask 0 too: the gradient of the mask is wanted
  double scale;
  double dropout_p;     // in [0, 1)
  const int64_t* seed;  // one number on the device; null without dropout
};

// stats: float32 [2, heads, all tokens], of each query m = max s c and 1 / Σ 2^(s c − m), with c = scale · log2(e).
struct AttentionForward {
  AttentionCall call;
  AttentionTensor<void*> o;         // 0 at padding and where the head mask is 0
  AttentionTensor<void*> unmasked;  // o before the head mask; null: not wanted
  float* stats;                     // null: not wanted
};

struct AttentionBackward {
  AttentionCall call;
  AttentionTensor<const void*> g;     // d loss / d o
  AttentionTensor<const void*> o;     // of the forward pass: before the head mask if every_head, else behind it
  const float* stats;                 // of the forward pass
  float* r;                           // [heads, all tokens]: memory to work in
  AttentionTensor<void*> dq, dk, dv;  // 0 at padding and where the head mask is 0
  float* dm;                          // [batch, heads]; null: not wanted
};

// The largest head size that the kernels take.
constexpr int64_t kAttentionMaxHeadSize = 128;

void attention_forward(const AttentionForward& call, int device, void* stream);
void attention_backward(const AttentionBackward& call, int device, void* stream);

}  // namespace distilbert_fast
