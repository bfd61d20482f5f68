#include "cpu/encoder/encoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "cpu/attention/attention.h"
#include "cpu/check.h"
#include "cpu/encoder/encoder_arena.h"
#include "cpu/encoder/encoder_live_heads.h"
#include "cpu/encoder/encoder_plan.h"
#include "cpu/gemm/matches.h"
#include "cpu/isa/bfloat16.h"
#include "cpu/isa/isa.h"
#include "cpu/team.h"
#include "cpu/threads.h"

namespace distilbert_fast {
namespace {

void require(bool holds, const std::string& expected, const std::string& given) {
  if (!holds) refuse("engine", expected, given);
}

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
        flow_(tier, model.weights),
        at_(buffers),
        scratch_(scratch),
        team_(team),
        chunk_(chunk) {}

  void go() {
    embed();
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      emit(i);
      layer(model_.layers[i], live_[i]);
      if (call_.largest != nullptr) note_largest(i);
    }
    emit(model_.layers.size());
  }

 private:
  // Each step ends when all members have done their share of it.

  void embed() {
    const int64_t first = chunk_.first_token;
    const auto lookup = [&](const std::vector<int64_t>& ids, const EmbeddingTable& table) {
      return Lookup{ids.data() + first, true, table.data, table.rows, model_.hidden, table.dtype};
    };
    EmbeddingRows rows = {};
    rows.lookups[0] = lookup(plan_.ids, model_.word);
    rows.lookups[1] = lookup(plan_.positions, model_.position);
    rows.lookups[2] = lookup(plan_.types, model_.token_type);
    rows.out = normalized(model_.norm);
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) { tier_.embedding_forward(rows, begin, end); });
  }

  void layer(const EncoderLayer& layer, const LiveHeads& live) {
    if (layer.heads > 0) {
      project(layer.qkv, x_operand(), Activation::none, at_.qkv, &live.qkv_panels, {0, chunk_.keys});
      if (chunk_.keys < chunk_.tokens) {  // nobody's keys and values
        project(layer.qkv, x_operand(), Activation::none, at_.qkv, &live.query_panels, {chunk_.keys, chunk_.tokens});
      }
      attend(layer, live);
      end_rows(at_.context, layer.heads * model_.head_size);
      quantize(at_.context, layer.heads * model_.head_size, at_.context_codes, at_.context_scale, layer.context_scale);
    }
    add_product(layer.out, operand(at_.context, at_.context_codes, at_.context_scale, layer.context_scale),
                live.out_blocks);
    normalize(layer.attention_norm);
    if (layer.ffn == 0) {  // only its bias is left
    } else if (flow_.codes && layer.ffn_scale > 0) {
      project_codes(layer.ffn_in, x_operand(), at_.ffn_codes, layer.ffn_factors);
    } else {
      project(layer.ffn_in, x_operand(), Activation::gelu, at_.ffn, nullptr, {0, chunk_.tokens});
      end_rows(at_.ffn, layer.ffn);
      quantize(at_.ffn, layer.ffn, at_.ffn_codes, at_.ffn_scale, layer.ffn_scale);
    }
    add_product(layer.ffn_out, operand(at_.ffn, at_.ffn_codes, at_.ffn_scale, layer.ffn_scale),
                {{0, static_cast<int32_t>(layer.ffn_out.blocks)}});
    normalize(layer.ffn_norm);
  }

  // What a linear layer reads: codes and their scales, or the low activations.
  struct Operand {
    Rows rows;
    const float* scale;
    int64_t scale_stride;
  };
  Operand operand(const Rows& low, const Rows& codes, const float* scale, const float& given) const {
    if (!flow_.codes) return {low, nullptr, 0};
    return given > 0 ? Operand{codes, &given, 0} : Operand{codes, scale, 1};
  }
  Operand x_operand() const {
    if (flow_.codes) return {at_.x_codes, at_.x_scale, 1};
    return {flow_.low_is_bfloat16 ? at_.x_low : at_.x, nullptr, 0};
  }

  void project(const PackedLinear& weights, const Operand& a, Activation activation, const Rows& out,
               const std::vector<int32_t>* panels, Range rows) {
    Gemm gemm = {};
    gemm.activation = activation;
    gemm.out = out.row(rows.begin);
    gemm.out_stride = out.stride / flow_.low_bytes();
    gemm.output = flow_.low_is_bfloat16 ? Output::bfloat16 : Output::float32;
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

  // Zeros after the columns of this layer, where a wider one, or another call, may have left what is not finite: the
  // weights that it meets are 0, and their product must be. Sums of codes are exact whatever stands there.
  void end_rows(const Rows& low, int64_t columns) {
    const int64_t begin = columns * flow_.low_bytes();
    const int64_t end = round_up(columns, block_elements(model_.weights)) * flow_.low_bytes();
    if (flow_.codes || begin == end) return;
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
    const GemmKernel kernel = model_.weights == Weights::int8       ? tier_.gemm_int8
                              : model_.weights == Weights::bfloat16 ? tier_.gemm_bfloat16
                                                                    : tier_.gemm_float32;
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

  void attend(const EncoderLayer& layer, const LiveHeads& live) {
    const int64_t wide = layer.heads * model_.head_size, size = flow_.low_bytes();
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
    forward.call.dtype = flow_.low();
    forward.call.head_mask = live.mask;
    forward.call.scale = 1.0 / std::sqrt(static_cast<double>(model_.head_size));
    forward.o = {at_.context.data, 0, at_.context.stride / size, model_.head_size};
    forward.o_dtype = flow_.low();
    team_.divide(chunk_.sequences * layer.heads,
                 [&](int64_t begin, int64_t end) { tier_.attention_forward(forward, begin, end, scratch_); });
  }

  void quantize(const Rows& low, int64_t columns, const Rows& codes, float* scale, const float& given) {
    if (!flow_.codes) return;
    QuantizeRows rows = {};
    rows.x = low.data;
    rows.x_stride = low.stride / flow_.low_bytes();
    rows.x_dtype = flow_.low();
    rows.columns = columns;
    rows.codes = {codes.data, codes.stride, tier_.code_flip, given > 0 ? nullptr : scale, given > 0 ? &given : nullptr,
                  0};
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) { tier_.quantize(rows, begin, end); });
  }

  // x = LayerNorm(x), and what the next linear layer reads of it.
  void normalize(const EncoderNorm& norm) {
    LayerNormRows rows = {};
    rows.x = at_.x.data;
    rows.x_stride = at_.x.stride / 4;
    rows.x_dtype = DType::float32;
    rows.out = normalized(norm);
    team_.divide(chunk_.tokens, [&](int64_t begin, int64_t end) { tier_.layer_norm_forward(rows, begin, end); });
  }
  Normalized normalized(const EncoderNorm& norm) const {
    Normalized out = {};
    out.weight = norm.weight;
    out.bias = norm.bias;
    out.eps = norm.eps;
    out.columns = model_.hidden;
    out.y = at_.x.data;
    out.y_stride = at_.x.stride / 4;
    out.y_dtype = DType::float32;
    if (flow_.codes) {
      out.codes = {at_.x_codes.data, at_.x_codes.stride, tier_.code_flip, at_.x_scale, nullptr, 0};
    } else if (flow_.low_is_bfloat16) {
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
      const float x = flow_.low_is_bfloat16 ? to_float(reinterpret_cast<const bfloat16*>(row)[c])
                                            : reinterpret_cast<const float*>(row)[c];
      if (!std::isnan(out[c]) && !(std::fabs(x) <= out[c])) out[c] = std::fabs(x);  // a NaN too, which stays
    }
  }

  const EncoderModel& model_;
  const EncoderCall& call_;
  const Plan& plan_;
  const std::vector<LiveHeads>& live_;
  const Kernels& tier_;
  const Flow flow_;
  const Buffers at_;
  uint8_t* const scratch_;
  const Team team_;
  const Chunk& chunk_;
};

void zero_padding(const EncoderModel& model, const EncoderCall& call, const Plan& plan) {
  const int64_t places = call.batch * call.length;
  if (static_cast<int64_t>(plan.places.size()) == places) return;
  std::vector<bool> real(static_cast<size_t>(places));
  for (const int64_t place : plan.places) real[static_cast<size_t>(place)] = true;
  const int64_t bytes = model.hidden * (call.out_dtype == DType::float32 ? 4 : 2);
  const size_t states = call.hidden_states.empty() ? 1 : model.layers.size() + 1;
  for (size_t i = 0; i < states; ++i) {
    uint8_t* out = static_cast<uint8_t*>(call.hidden_states.empty() ? call.out : call.hidden_states[i]);
    for (int64_t p = 0; p < places; ++p) {
      if (!real[static_cast<size_t>(p)]) std::memset(out + p * bytes, 0, static_cast<size_t>(bytes));
    }
  }
}

}  // namespace

Widest widest(const EncoderModel& model) {
  Widest most;
  for (const EncoderLayer& layer : model.layers) {
    most.heads = std::max(most.heads, layer.heads);
    most.ffn = std::max(most.ffn, layer.ffn);
  }
  return most;
}

Encoder::Encoder(EncoderModel model) : model_(std::move(model)) {
  const auto size = [](int64_t n) { return std::to_string(n); };
  require(model_.hidden >= 1, "hidden size must be 1 or more", size(model_.hidden));
  require(model_.head_size >= 1, "head size must be 1 or more", size(model_.head_size));
  for (const EncoderLayer& layer : model_.layers) {
    require(layer.heads >= 0 && layer.ffn >= 0, "heads and ffn must be 0 or more",
            size(layer.heads) + " and " + size(layer.ffn));
    const int64_t wide = layer.heads * model_.head_size;
    const auto fits = [&](const char* name, const PackedLinear& linear, int64_t columns, int64_t k) {
      const int64_t blocks = (k + block_elements(model_.weights) - 1) / block_elements(model_.weights);
      const bool holds = linear.columns == columns && linear.blocks == blocks;
      require(holds, std::string(name) + " must be of " + size(columns) + " columns and " + size(blocks) + " blocks",
              size(linear.columns) + " and " + size(linear.blocks));
    };
    fits("qkv", layer.qkv, 3 * wide, model_.hidden);
    fits("out", layer.out, model_.hidden, wide);
    fits("ffn_in", layer.ffn_in, layer.ffn, model_.hidden);
    fits("ffn_out", layer.ffn_out, model_.hidden, layer.ffn);
    require(layer.ffn_scale == 0 || layer.ffn_factors != nullptr, "ffn_factors must point to memory", "null");
  }
}

// The model as a call of so many tokens is to read it.
const EncoderModel& Encoder::model_for(int64_t tokens, const Kernels& tier, int threads) {
  constexpr int64_t kTokensWorthMatching = 128;  // those before them are answered sooner without
  if (model_.weights != Weights::int8 || tier.match_groups == nullptr) return model_;
  if (tokens_.fetch_add(tokens, std::memory_order_relaxed) + tokens < kTokensWorthMatching) return model_;
  std::call_once(matched_, [&] {
    matched_model_ = model_;
    std::vector<PackedLinear*> linears;
    for (EncoderLayer& layer : matched_model_.layers) {
      linears.insert(linears.end(), {&layer.qkv, &layer.out, &layer.ffn_in, &layer.ffn_out});
    }
    matches_ = match_groups(linears, tier, threads);
  });
  return matched_model_;
}

Encoder::~Encoder() = default;

void Encoder::run(const EncoderCall& call, int threads) {
  require(call.batch >= 0 && call.length >= 0, "batch and length must be 0 or more",
          std::to_string(call.batch) + " and " + std::to_string(call.length));
  require(call.batch * call.length <= INT32_MAX, "batch · length must fit in 31 bits",
          std::to_string(call.batch) + " · " + std::to_string(call.length));
  if (call.batch * call.length == 0) return;
  if (call.largest != nullptr) {
    const bool dynamic = std::all_of(model_.layers.begin(), model_.layers.end(),
                                     [](const EncoderLayer& layer) { return layer.ffn_scale == 0; });
    require(model_.weights == Weights::int8 && dynamic, "layers must be int8 and find scales to be calibrated",
            "others");
  }
  require(call.ids != nullptr, "input_ids must point to memory", "null");
  require(call.out != nullptr || !call.hidden_states.empty(), "an output must point to memory", "null");
  require(call.hidden_states.empty() || call.hidden_states.size() == model_.layers.size() + 1,
          "hidden_states must be " + std::to_string(model_.layers.size() + 1),
          std::to_string(call.hidden_states.size()));
  threads = std::max(usable_threads(threads), 1);

  const Plan plan = make_plan(model_, call, threads);
  zero_padding(model_, call, plan);
  if (plan.ids.empty()) return;

  const Kernels& tier = kernels();
  const EncoderModel& model = model_for(static_cast<int64_t>(plan.ids.size()), tier, threads);
  std::vector<LiveHeads> live;
  int64_t blocks = 0;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const EncoderLayer& layer = model.layers[i];
    const float* mask = call.head_mask == nullptr ? nullptr : call.head_mask + i * call.head_mask_stride;
    live.push_back(live_heads(model, layer, mask));
    for (const PackedLinear* linear : {&layer.qkv, &layer.out, &layer.ffn_in, &layer.ffn_out}) {
      blocks = std::max(blocks, linear->blocks);
    }
  }

  const Flow flow(tier, model.weights);
  const int64_t groups = static_cast<int64_t>(plan.groups.size()) - 1, sets = plan.shared ? 1 : threads;
  std::vector<std::atomic<int64_t>> taken(static_cast<size_t>(groups));  // of each group's chunks
  for (int64_t i = 0; i < groups; ++i) taken[i] = plan.groups[i];
  const int64_t scratch =
      std::max(gemm_scratch_bytes(blocks), attention_forward_scratch(plan.longest, model.head_size));
  std::unique_ptr<Arena> arena = take(flow, plan.largest, sets, scratch, threads);
  SpinBarrier barrier;
  run_team(threads, [&](int rank, int size) {
    if (plan.shared) {
      Team team = {rank, size, &barrier};
      for (const Chunk& chunk : plan.chunks) {
        Walk(model, call, plan, live, tier, arena->set(model, 0), arena->scratch(rank), team, chunk).go();
      }
      return;
    }
    // Its own group, then what is left of others': a core that others want too may be late with its own.
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t group = (rank + i) % groups;
      for (int64_t next = taken[group]++; next < plan.groups[group + 1]; next = taken[group]++) {
        Walk(model, call, plan, live, tier, arena->set(model, rank), arena->scratch(rank), Team(), plan.chunks[next])
            .go();
      }
    }
  });
  give(std::move(arena));
}

std::unique_ptr<Arena> Encoder::take(const Flow& flow, int64_t rows, int64_t sets, int64_t scratch, int64_t threads) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& arena : spare_) {
      if (!arena->serves(flow, rows, sets, scratch, threads)) continue;
      std::unique_ptr<Arena> taken = std::move(arena);
      std::swap(arena, spare_.back());
      spare_.pop_back();
      return taken;
    }
    spare_.clear();  // they served smaller batches than now come
  }
  return std::make_unique<Arena>(model_, flow, round_up(rows, 64), sets, scratch, threads);
}

void Encoder::give(std::unique_ptr<Arena> arena) {
  constexpr size_t kSpare = 4;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (spare_.size() < kSpare) spare_.push_back(std::move(arena));
}

}  // namespace distilbert_fast
