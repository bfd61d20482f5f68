// Launchers of attention on a GPU: see ops/attention.py for the contract, attention.cu and attention_backward.cu for
// the arithmetic. No CUDA header is needed to call them.
#pragma once

#include <cstdint>

namespace distilbert_fast {

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

// Queue the kernels on `stream` of `device` and return; nothing waits, so a graph can capture it. Throw
// std::invalid_argument if an argument makes no sense, std::runtime_error if CUDA refuses.
void attention_forward(const AttentionForward& call, int device, void* stream);
void attention_backward(const AttentionBackward& call, int device, void* stream);

}  // namespace distilbert_fast
