// A whole DistilBERT, BERT or RoBERTa encoder in one call: ids in, hidden states out.
//
//     embedding + LayerNorm → L × (QKV → attention → out + x → LayerNorm → FFN in, GELU → FFN out + x → LayerNorm)
//
// Padding goes on entry, unless it is asked for. A batch of many tokens is dealt out by sequences, chunk by chunk: a
// thread takes one through all layers in its own caches and waits for nobody. Of a small batch all threads compute each
// step together, so that every weight is read once. Which of the two, and by how many threads, changes no bit of the
// result. Layers may differ in heads and F; what is left out of one costs nothing. Each linear layer may be int8, all
// others are of one kind, float32 or bfloat16.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/ops/rows.h"

namespace distilbert_fast {

struct EncoderNorm {
  const float* weight;  // [C]
  const float* bias;    // [C]
  double eps;
};

struct EncoderLayer {
  PackedLinear qkv;      // [C] -> [3, heads, D]
  PackedLinear out;      // [heads, D] -> [C]
  PackedLinear ffn_in;   // [C] -> [F]
  PackedLinear ffn_out;  // [F] -> [C]
  EncoderNorm attention_norm, ffn_norm;
  int64_t heads;        // 0: the attention's result is the bias of `out`
  int64_t ffn;          // F of this layer; 0: its result is the bias of ffn_out
  float context_scale;  // of the codes that an int8 `out` reads, and ffn_out likewise; 0: each row finds its own
  float ffn_scale;
  const float* ffn_factors;  // [F padded], with a given ffn_scale: codes of GELU's y are y · factor, by channel

  std::array<const PackedLinear*, 4> linears() const { return {&qkv, &out, &ffn_in, &ffn_out}; }
};

struct EmbeddingTable {
  const void* data;  // [rows, C]; int8 codes where there are scales
  int64_t rows;
  DType dtype;
  const float* scale;  // [rows], or null
};

struct EncoderModel {
  int64_t hidden, head_size;
  EmbeddingTable word, position, token_type;  // token_type.data may be null
  EncoderNorm norm;
  int64_t padding_idx;  // RoBERTa counts positions of other ids from padding_idx + 1; −1: by place
  std::vector<EncoderLayer> layers;
};

struct EncoderCall {
  const void* ids;  // [batch, length]
  bool ids_are_int64;
  int64_t batch, length;
  const void* mask;               // [batch, length], nothing but zero bytes = padding; null: no padding
  int64_t mask_bytes;             // of an element
  const int64_t* position_ids;    // [batch or 1, length]; null: counted
  int64_t position_stride;        // length or 0
  const int64_t* token_type_ids;  // null: 0
  int64_t token_type_stride;
  bool padding;            // compute padded positions too: their queries meet the keys of the tokens
  const float* head_mask;  // [L, widest layer's heads]; null: 1
  int64_t head_mask_stride;
  void* out;  // [batch, length, C]; 0 at padding that is not computed
  DType out_dtype;
  std::vector<void*> hidden_states;  // L + 1 times the like of out; empty: not wanted
  float* largest;                    // [L, widest · D + widest F], raised to magnitudes of what out and ffn_out read
};

class Arena;
class SideWork;
struct Flow;
struct Kernels;

// The most heads, and the most feed-forward channels, that a layer has.
struct Widest {
  int64_t heads = 0, ffn = 0;
};
Widest widest(const EncoderModel& model);

// Immutable but for its spare working memory; calls may run at the same time.
class Encoder {
 public:
  // Throws std::invalid_argument if parts do not fit together. What it points to must outlive it.
  explicit Encoder(EncoderModel model);
  ~Encoder();

  // Throws std::invalid_argument before it computes anything if an id or a position is outside its table.
  // Threads do `aside`, which may be null, to its end where they would wait; nothing of it for a call without tokens.
  void run(const EncoderCall& call, int threads, SideWork* aside);

 private:
  std::unique_ptr<Arena> take(const Flow& flow, int64_t rows, int64_t sets, int64_t scratch, int64_t threads);
  void give(std::unique_ptr<Arena> arena);

  const EncoderModel& model_for(int64_t tokens, const Kernels& tier, int threads);

  const EncoderModel model_;
  std::atomic<int64_t> tokens_{0};    // of all calls
  std::atomic<bool> matched_{false};  // of a tier that reads matches, once they pay
  EncoderModel matched_model_;
  std::vector<uint32_t> matches_;
  std::vector<std::unique_ptr<Arena>> spare_;
};

}  // namespace distilbert_fast
