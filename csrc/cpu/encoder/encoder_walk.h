// One chunk's way through the layers: which kernel computes what, of which buffers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/encoder/encoder_arena.h"
#include "cpu/encoder/encoder_live_heads.h"
#include "cpu/encoder/encoder_plan.h"
#include "cpu/isa/bfloat16.h"
#include "cpu/isa/kernels.h"
#include "cpu/team.h"

namespace distilbert_fast {

// One member's way through the layers with one chunk.
class Walk {
 public:
  Walk(const EncoderModel& model, const EncoderCall& call, const Plan& plan, const std::vector<LiveHeads>& live,
       const Kernels& tier, const Buffers& buffers, uint8_t* scratch, const Team& team, const Chunk& chunk)
      : model_(model),
        call_(call),
        plan_(plan),
        live_(live),
        tier_(tier),
        at_(buffers),
        scratch_(scratch),
        team_(team),
        chunk_(chunk) {}

  void go() {
    constexpr size_t kLastLayers = 3;  // what comes before them leaves nothing else in the caches
    embed();
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      if (team_.aside != nullptr && i + kLastLayers >= model_.layers.size()) team_.aside->near_end();
      emit(i);
      layer(i);
      if (call_.largest != nullptr) note_largest(i);
    }
    emit(model_.layers.size());
  }

 private:
  // Each step ends when all members have done their share of it.

  void embed() {
    const int64_t first = chunk_.first_token;
    if (model_.word.scale != nullptr) return embed_codes();
    const auto lookup = [&](const std::vector<int64_t>& ids, const EmbeddingTable& table) {
      return Lookup{ids.data() + first, true, table.data, table.rows, model_.hidden, table.dtype};
    };
    EmbeddingRows rows = {};
    rows.lookups[0] = lookup(plan_.ids, model_.word);
    rows.lookups[1] = lookup(plan_.positions, model_.position);
    rows.lookups[2] = lookup(plan_.types, model_.token_type);
    rows.out = normalized(model_.norm, reader_after(-1));
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) { tier_.embedding_forward(rows, begin, end); });
  }

  void embed_codes() {
    const auto coded = [&](const std::vector<int64_t>& ids, const EmbeddingTable& table) {
      return CodedLookup{ids.data() + chunk_.first_token, static_cast<const int8_t*>(table.data), table.scale};
    };
    CodedRows rows = {};
    rows.lookups[0] = coded(plan_.ids, model_.word);
    rows.lookups[1] = coded(plan_.positions, model_.position);
    rows.lookups[2] = coded(plan_.types, model_.token_type);
    rows.columns = model_.hidden;
    rows.out = reinterpret_cast<float*>(at_.x.data);
    rows.out_stride = at_.x.stride / 4;
    const LayerNormRows norm = normalization(model_.norm, reader_after(-1));
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) {
      tier_.add_coded_rows(rows, begin, end);
      tier_.layer_norm_forward(norm, begin, end);
    });
  }

  // Who reads what layer `index` puts out, or −1, the embeddings; null: nobody.
  const PackedLinear* reader_after(int64_t index) const {
    const auto next = static_cast<size_t>(index + 1);
    return next < model_.layers.size() && model_.layers[next].heads > 0 ? &model_.layers[next].qkv : nullptr;
  }

  void layer(size_t index) {
    const EncoderLayer& layer = model_.layers[index];
    const LiveHeads& live = live_[index];
    low_is_bfloat16_ = low_is_bfloat16(layer, tier_);
    if (layer.heads > 0) {
      const Operand x = x_operand(layer.qkv);
      project(layer.qkv, x, Activation::none, at_.qkv, &live.qkv_panels, {0, chunk_.keys});
      if (chunk_.keys < chunk_.tokens) {  // nobody's keys and values
        project(layer.qkv, x, Activation::none, at_.qkv, &live.query_panels, {chunk_.keys, chunk_.tokens});
      }
      attend(layer, live);
      prepare(layer.out, at_.context, layer.heads * model_.head_size, at_.context_codes, at_.context_scale,
              layer.context_scale);
    }
    add_product(layer.out, operand(layer.out, at_.context, at_.context_codes, at_.context_scale, layer.context_scale),
                live.out_blocks);
    normalize(layer.attention_norm, layer.ffn > 0 ? &layer.ffn_in : nullptr);
    if (layer.ffn == 0) {  // only its bias is left
    } else if (layer.ffn_scale > 0) {
      project_codes(layer.ffn_in, x_operand(layer.ffn_in), at_.ffn_codes, layer.ffn_factors);
    } else {
      project(layer.ffn_in, x_operand(layer.ffn_in), Activation::gelu, at_.ffn, nullptr, {0, chunk_.tokens});
      prepare(layer.ffn_out, at_.ffn, layer.ffn, at_.ffn_codes, at_.ffn_scale, layer.ffn_scale);
    }
    add_product(layer.ffn_out, operand(layer.ffn_out, at_.ffn, at_.ffn_codes, at_.ffn_scale, layer.ffn_scale),
                {{0, static_cast<int32_t>(layer.ffn_out.blocks)}});
    normalize(layer.ffn_norm, reader_after(static_cast<int64_t>(index)));
  }

  // What a linear layer reads: codes and their scales, or the low activations.
  struct Operand {
    Rows rows;
    const float* scale;
    int64_t scale_stride;
  };
  Operand operand(const PackedLinear& reader, const Rows& low, const Rows& codes, const float* scale,
                  const float& given) const {
    if (!reads_codes(reader.kind)) return {low, nullptr, 0};
    return given > 0 ? Operand{codes, &given, 0} : Operand{codes, scale, 1};
  }
  Operand x_operand(const PackedLinear& reader) const {
    if (reads_codes(reader.kind)) return {at_.x_codes, at_.x_scale, 1};
    return {reads_low(reader) ? at_.x_low : at_.x, nullptr, 0};
  }
  bool reads_low(const PackedLinear& reader) const { return reader.kind == Weights::bfloat16 && tier_.reads_bfloat16; }
  DType low() const { return low_is_bfloat16_ ? DType::bfloat16 : DType::float32; }
  int64_t low_bytes() const { return low_is_bfloat16_ ? 2 : 4; }

  void project(const PackedLinear& weights, const Operand& a, Activation activation, const Rows& out,
               const std::vector<int32_t>* panels, Range rows) {
    Gemm gemm = {};
    gemm.activation = activation;
    gemm.out = out.row(rows.begin);
    gemm.out_stride = out.stride / low_bytes();
    gemm.output = low_is_bfloat16_ ? Output::bfloat16 : Output::float32;
    const Operand from = {
        {a.rows.row(rows.begin), a.rows.stride}, a.scale + rows.begin * a.scale_stride, a.scale_stride};
    multiply(gemm, weights, from, {{0, static_cast<int32_t>(weights.blocks)}}, panels, rows.end - rows.begin);
  }

  void project_codes(const PackedLinear& weights, const Operand& a, const Rows& out, const float* factors) {
    Gemm gemm = {};
    gemm.activation = Activation::gelu_fast;
    gemm.out = out.data;
    gemm.out_stride = out.stride;
    gemm.output = Output::codes;
    gemm.out_factors = factors;
    gemm.out_flip = tier_.code_flip;
    multiply(gemm, weights, a, {{0, static_cast<int32_t>(weights.blocks)}}, nullptr, chunk_.tokens);
  }

  // Zeros after the columns of this layer, where another one or another call may have left what is not finite: the
  // weights that it meets are 0, and their product must be. Sums of codes are exact whatever stands there.
  void end_rows(const PackedLinear& reader, const Rows& low, int64_t columns) {
    const int64_t begin = columns * low_bytes();
    const int64_t end = round_up(columns, block_elements(reader.kind)) * low_bytes();
    if (begin == end) return;
    team_.divide(chunk_.tokens, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) std::memset(low.row(r) + begin, 0, static_cast<size_t>(end - begin));
    });
  }

  // x += a Wᵀ + b
  void add_product(const PackedLinear& weights, const Operand& a, const std::vector<BlockRange>& blocks) {
    Gemm gemm = {};
    gemm.residual = gemm.out = at_.x.data;
    gemm.residual_stride = gemm.out_stride = at_.x.stride / 4;
    gemm.output = Output::float32;
    static const float none = 0;  // of no codes: what another layer or call left in their place may not be finite
    multiply(gemm, weights, weights.blocks > 0 ? a : Operand{a.rows, &none, 0}, blocks, nullptr, chunk_.tokens);
  }

  void multiply(Gemm& gemm, const PackedLinear& weights, const Operand& a, const std::vector<BlockRange>& blocks,
                const std::vector<int32_t>* panels, int64_t rows) {
    gemm.weights = weights;
    gemm.a = a.rows.data;
    gemm.a_stride = a.rows.stride;
    gemm.a_scale = a.scale;
    gemm.a_scale_stride = a.scale_stride;
    gemm.blocks = blocks.data();
    gemm.block_ranges = static_cast<int64_t>(blocks.size());
    const bool listed = panels != nullptr && !panels->empty();
    gemm.panels = listed ? panels->data() : nullptr;
    const int64_t count = listed ? static_cast<int64_t>(panels->size()) : weights.panel_count();
    const GemmKernel kernel = kernel_of(weights.kind);
    // Sharing panels, each weight is read by one member only. Where there are too few, row bands share them.
    const int64_t bands = count > 0 ? (team_.size + count - 1) / count : 1;
    const int64_t height = round_up((rows + bands - 1) / bands, kRowUnit);
    team_.divide_ahead(count * bands, [&](Range part, Range next) {
      for (int64_t unit = part.begin; unit < part.end;) {
        const int64_t band = unit / count, stop = std::min(part.end, (band + 1) * count);
        gemm.next_panel = next.begin < next.end ? next.begin % count : -1;
        const int64_t from = std::min(rows, band * height), to = std::min(rows, from + height);
        if (from < to) kernel(gemm, from, to, unit - band * count, stop - band * count, scratch_);
        unit = stop;
      }
    });
  }

  GemmKernel kernel_of(Weights kind) const {
    switch (kind) {
      case Weights::int8:
        return tier_.gemm_int8;
      case Weights::codebook16:
        return tier_.gemm_codebook16;
      case Weights::bfloat16:
        return tier_.gemm_bfloat16;
      case Weights::float32:
        break;
    }
    return tier_.gemm_float32;
  }

  void attend(const EncoderLayer& layer, const LiveHeads& live) {
    const int64_t wide = layer.heads * model_.head_size, size = low_bytes();
    const auto part = [&](int64_t i) {
      return AttentionTensor<const void*>{at_.qkv.data + i * wide * size, 0, at_.qkv.stride / size, model_.head_size};
    };
    AttentionForward forward = {};
    forward.call.sequences = {plan_.offsets.data() + chunk_.first_offset, nullptr, 0, chunk_.sequences,
                              plan_.padding_offsets.data() + chunk_.first_offset};
    forward.call.heads = layer.heads;
    forward.call.head_size = model_.head_size;
    forward.call.q = part(0);
    forward.call.k = part(1);
    forward.call.v = part(2);
    forward.call.dtype = low();
    forward.call.head_mask = live.mask;
    forward.call.scale = 1.0 / std::sqrt(static_cast<double>(model_.head_size));
    forward.o = {at_.context.data, 0, at_.context.stride / size, model_.head_size};
    forward.o_dtype = low();
    team_.divide(chunk_.sequences * layer.heads,
                 [&](int64_t begin, int64_t end) { tier_.attention_forward(forward, begin, end, scratch_); });
  }

  // Low activations for who reads them: as codes, or with zeros after their columns.
  void prepare(const PackedLinear& reader, const Rows& x, int64_t columns, const Rows& codes, float* scale,
               const float& given) {
    if (!reads_codes(reader.kind)) return end_rows(reader, x, columns);
    QuantizeRows rows = {};
    rows.x = x.data;
    rows.x_stride = x.stride / low_bytes();
    rows.x_dtype = low();
    rows.columns = columns;
    rows.codes = {codes.data, codes.stride, tier_.code_flip, given > 0 ? nullptr : scale, given > 0 ? &given : nullptr,
                  0};
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) { tier_.quantize(rows, begin, end); });
  }

  // x = LayerNorm(x), and what the next linear layer reads of it.
  void normalize(const EncoderNorm& norm, const PackedLinear* reader) {
    const LayerNormRows rows = normalization(norm, reader);
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) { tier_.layer_norm_forward(rows, begin, end); });
  }
  LayerNormRows normalization(const EncoderNorm& norm, const PackedLinear* reader) const {
    LayerNormRows rows = {};
    rows.x = at_.x.data;
    rows.x_stride = at_.x.stride / 4;
    rows.x_dtype = DType::float32;
    rows.out = normalized(norm, reader);
    return rows;
  }
  Normalized normalized(const EncoderNorm& norm, const PackedLinear* reader) const {
    Normalized out = {};
    out.weight = norm.weight;
    out.bias = norm.bias;
    out.eps = norm.eps;
    out.columns = model_.hidden;
    out.y = at_.x.data;
    out.y_stride = at_.x.stride / 4;
    out.y_dtype = DType::float32;
    if (reader == nullptr) return out;
    if (reads_codes(reader->kind)) {
      out.codes = {at_.x_codes.data, at_.x_codes.stride, tier_.code_flip, at_.x_scale, nullptr, 0};
    } else if (reads_low(*reader)) {
      out.y_low = reinterpret_cast<bfloat16*>(at_.x_low.data);
      out.y_low_stride = at_.x_low.stride / 2;
    }
    return out;
  }

  // x as hidden state `index`, in its place in the batch.
  void emit(size_t index) {
    void* out = !call_.hidden_states.empty()    ? call_.hidden_states[index]
                : index == model_.layers.size() ? call_.out
                                                : nullptr;
    if (out == nullptr) return;
    const int64_t bytes = model_.hidden * (call_.out_dtype == DType::float32 ? 4 : 2);
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        uint8_t* to = static_cast<uint8_t*>(out) + plan_.places[chunk_.first_token + r] * bytes;
        const float* x = reinterpret_cast<const float*>(at_.x.row(r));
        if (call_.out_dtype == DType::float32) {
          std::memcpy(to, x, static_cast<size_t>(bytes));
        } else {
          for (int64_t c = 0; c < model_.hidden; ++c) reinterpret_cast<bfloat16*>(to)[c] = to_bfloat16(x[c]);
        }
      }
    });
  }

  // For calibration, which is in no hurry.
  void note_largest(size_t index) {
    if (team_.rank == 0) {
      const Widest most = widest(model_);
      const int64_t wide = most.heads * model_.head_size;
      float* out = call_.largest + index * static_cast<size_t>(wide + most.ffn);
      static std::mutex mutex;
      const std::lock_guard<std::mutex> lock(mutex);
      for (int64_t r = 0; r < chunk_.tokens; ++r) {
        raise(at_.context.row(r), model_.layers[index].heads * model_.head_size, out);
        raise(at_.ffn.row(r), model_.layers[index].ffn, out + wide);
      }
    }
    team_.wait();
  }
  void raise(const uint8_t* row, int64_t columns, float* out) const {
    for (int64_t c = 0; c < columns; ++c) {
      const float x = low_is_bfloat16_ ? to_float(reinterpret_cast<const bfloat16*>(row)[c])
                                       : reinterpret_cast<const float*>(row)[c];
      if (!std::isnan(out[c]) && !(std::fabs(x) <= out[c])) out[c] = std::fabs(x);  // a NaN too, which stays
    }
  }

  const EncoderModel& model_;
  const EncoderCall& call_;
  const Plan& plan_;
  const std::vector<LiveHeads>& live_;
  const Kernels& tier_;
  const Buffers at_;
  uint8_t* const scratch_;
  const Team team_;
  const Chunk& chunk_;
  bool low_is_bfloat16_ = false;  // in the layer that is computed
};

}  // namespace distilbert_fast
