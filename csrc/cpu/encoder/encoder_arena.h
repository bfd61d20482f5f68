// The working memory of a chunk on its way through the layers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/buffer.h"
#include "cpu/encoder/encoder.h"
#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// "Low" activations are bfloat16 where the tier multiplies that and all weights of a layer take it, else float32.
inline bool low_is_bfloat16(const EncoderLayer& layer, const Kernels& tier) {
  bool takes = tier.reads_bfloat16;
  for (const PackedLinear* linear : layer.linears()) takes = takes && linear->kind != Weights::float32;
  return takes;
}

// What of it a model needs. int8 weights read codes, bfloat16 ones x_low where the tier multiplies bfloat16.
struct Flow {
  int64_t low_bytes = 2;  // of the widest low activations
  bool codes = false;
  bool x_low = false;

  Flow(const EncoderModel& model, const Kernels& tier) {
    for (const EncoderLayer& layer : model.layers) {
      if (!low_is_bfloat16(layer, tier)) low_bytes = 4;
      for (const PackedLinear* linear : layer.linears()) {
        codes = codes || reads_codes(linear->kind);
        x_low = x_low || (linear->kind == Weights::bfloat16 && tier.reads_bfloat16);
      }
    }
  }
  bool operator==(const Flow& other) const {
    return low_bytes == other.low_bytes && codes == other.codes && x_low == other.x_low;
  }
};

// A matrix of activations, as wide as the widest layer needs it. Rows begin on a cache line and end with zeros up to
// whole blocks of weights.
struct Rows {
  uint8_t* data = nullptr;
  int64_t stride = 0;  // bytes

  uint8_t* row(int64_t r) const { return data + r * stride; }
};

struct Buffers {
  Rows x;              // float32 [rows, C], the residual stream
  Rows x_low;          // bfloat16 [rows, C]: of x
  Rows x_codes;        // [rows, C]
  Rows qkv;            // low [rows, 3, heads, D]
  Rows context;        // low [rows, heads, D]
  Rows context_codes;  //
  Rows ffn;            // low [rows, F]
  Rows ffn_codes;      //
  float* x_scale;      // [rows]
  float* context_scale;
  float* ffn_scale;
};

// One or several sets of buffers, and scratch for each thread. Zeroed once: kernels write no padding but of whole rows.
class Arena {
 public:
  Arena(const EncoderModel& model, const Flow& flow, int64_t rows, int64_t sets, int64_t scratch_bytes, int64_t threads)
      : flow_(flow), rows_(rows), sets_(sets), scratch_bytes_(round_up(scratch_bytes, 4096)), threads_(threads) {
    Buffers unused;
    set_bytes_ = round_up(lay_out(model, nullptr, &unused), 4096);
    bytes_ = round_up(set_bytes_ * sets + scratch_bytes_ * threads, kHugePage);
    data_ = static_cast<uint8_t*>(allocate(bytes_, kHugePage));
    std::memset(data_, 0, static_cast<size_t>(set_bytes_ * sets));
  }
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  bool serves(const Flow& flow, int64_t rows, int64_t sets, int64_t scratch_bytes, int64_t threads) const {
    return flow_ == flow && rows <= rows_ && sets <= sets_ && scratch_bytes <= scratch_bytes_ && threads <= threads_;
  }
  Buffers set(const EncoderModel& model, int64_t i) const {
    Buffers buffers;
    lay_out(model, data_ + i * set_bytes_, &buffers);
    return buffers;
  }
  uint8_t* scratch(int64_t thread) const { return data_ + set_bytes_ * sets_ + scratch_bytes_ * thread; }

 private:
  // Bytes of a set that starts at `base`.
  int64_t lay_out(const EncoderModel& model, uint8_t* base, Buffers* out) const {
    int64_t used = 0;
    const Widest most = widest(model);
    const int64_t wide = most.heads * model.head_size;
    const auto floats = [&](float** p) {
      *p = reinterpret_cast<float*>(base + used);
      used += round_up(rows_ * 4, 64);
    };
    const auto rows = [&](Rows* p, int64_t columns, int64_t bytes, bool wanted) {
      *p = {base + used, round_up(columns * bytes, 128)};  // 128: a block where float32 meets bfloat16 weights
      if (wanted) used += (rows_ + kRowUnit) * p->stride;
    };
    const int64_t low = flow_.low_bytes;
    floats(&out->x_scale);
    floats(&out->context_scale);
    floats(&out->ffn_scale);
    rows(&out->x, model.hidden, 4, true);
    rows(&out->x_low, model.hidden, 2, flow_.x_low);
    rows(&out->x_codes, model.hidden, 1, flow_.codes);
    rows(&out->qkv, 3 * wide, low, true);
    rows(&out->context, wide, low, true);
    rows(&out->context_codes, wide, 1, flow_.codes);
    rows(&out->ffn, most.ffn, low, true);
    rows(&out->ffn_codes, most.ffn, 1, flow_.codes);
    return used;
  }

  Flow flow_;
  int64_t rows_, sets_, scratch_bytes_, threads_, set_bytes_, bytes_;
  uint8_t* data_;
};

}  // namespace distilbert_fast
