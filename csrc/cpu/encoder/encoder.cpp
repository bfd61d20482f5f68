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
#include "cpu/encoder/encoder_walk.h"
#include "cpu/gemm/matches.h"
#include "cpu/isa/isa.h"
#include "cpu/team.h"
#include "cpu/threads.h"

namespace distilbert_fast {
namespace {

void require(bool holds, const std::string& expected, const std::string& given) {
  if (!holds) refuse("engine", expected, given);
}

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
  for (const EmbeddingTable* table : {&model_.position, &model_.token_type}) {
    const bool alike = table->data == nullptr || (table->scale == nullptr) == (model_.word.scale == nullptr);
    require(alike, "tables must all have scales, or none", "some");
  }
  Weights floats = Weights::int8;  // none yet
  for (const EncoderLayer& layer : model_.layers) {
    require(layer.heads >= 0 && layer.ffn >= 0, "heads and ffn must be 0 or more",
            size(layer.heads) + " and " + size(layer.ffn));
    const int64_t wide = layer.heads * model_.head_size;
    const auto fits = [&](const char* name, const PackedLinear& linear, int64_t columns, int64_t k) {
      const int64_t blocks = (k + block_elements(linear.kind) - 1) / block_elements(linear.kind);
      const bool holds = linear.columns == columns && linear.blocks == blocks;
      require(holds, std::string(name) + " must be of " + size(columns) + " columns and " + size(blocks) + " blocks",
              size(linear.columns) + " and " + size(linear.blocks));
    };
    fits("qkv", layer.qkv, 3 * wide, model_.hidden);
    fits("out", layer.out, model_.hidden, wide);
    fits("ffn_in", layer.ffn_in, layer.ffn, model_.hidden);
    fits("ffn_out", layer.ffn_out, model_.hidden, layer.ffn);
    require(layer.ffn_scale == 0 || layer.ffn_factors != nullptr, "ffn_factors must point to memory", "null");
    require((layer.context_scale == 0 || reads_codes(layer.out.kind)) &&
                (layer.ffn_scale == 0 || reads_codes(layer.ffn_out.kind)),
            "layers with given scales must be int8", "others");
    for (const PackedLinear* linear : layer.linears()) {
      if (reads_codes(linear->kind)) continue;
      require(floats == Weights::int8 || floats == linear->kind, "float layers must be of one kind", "two");
      floats = linear->kind;
    }
  }
}

// The model as a call of so many tokens is to read it.
const EncoderModel& Encoder::model_for(int64_t tokens, const Kernels& tier, int threads) {
  constexpr int64_t kTokensWorthMatching = 128;  // those before them are answered sooner without
  if (tier.match_groups == nullptr || !Flow(model_, tier).codes) return model_;
  if (tokens_.fetch_add(tokens, std::memory_order_relaxed) + tokens < kTokensWorthMatching) return model_;
  if (matched_.load(std::memory_order_acquire)) return matched_model_;
  const std::lock_guard<std::mutex> lock(mutex_of(Guarded::matches));
  if (matched_.load(std::memory_order_relaxed)) return matched_model_;
  matched_model_ = model_;
  std::vector<PackedLinear*> linears;
  for (EncoderLayer& layer : matched_model_.layers) {
    for (PackedLinear* linear : {&layer.qkv, &layer.out, &layer.ffn_in, &layer.ffn_out}) {
      if (reads_codes(linear->kind)) linears.push_back(linear);
    }
  }
  matches_ = match_groups(linears, tier, threads);
  matched_.store(true, std::memory_order_release);
  return matched_model_;
}

Encoder::~Encoder() = default;

void Encoder::run(const EncoderCall& call, int threads, SideWork* aside) {
  require(call.batch >= 0 && call.length >= 0, "batch and length must be 0 or more",
          std::to_string(call.batch) + " and " + std::to_string(call.length));
  require(call.batch * call.length <= INT32_MAX, "batch · length must fit in 31 bits",
          std::to_string(call.batch) + " · " + std::to_string(call.length));
  if (call.batch * call.length == 0) return;
  if (call.largest != nullptr) {
    const bool dynamic = std::all_of(model_.layers.begin(), model_.layers.end(),
                                     [](const EncoderLayer& layer) { return layer.ffn_scale == 0; });
    require(dynamic, "layers must find scales to be calibrated", "others");
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
  int64_t scratch = attention_forward_scratch(plan.longest, model.head_size);
  for (size_t i = 0; i < model.layers.size(); ++i) {
    const EncoderLayer& layer = model.layers[i];
    const float* mask = call.head_mask == nullptr ? nullptr : call.head_mask + i * call.head_mask_stride;
    live.push_back(live_heads(model, layer, mask));
    for (const PackedLinear* linear : layer.linears()) {
      scratch = std::max(scratch, gemm_scratch_bytes(linear->kind, linear->blocks));
    }
  }

  const Flow flow(model, tier);
  const int64_t groups = static_cast<int64_t>(plan.groups.size()) - 1, sets = plan.shared ? 1 : threads;
  std::vector<std::atomic<int64_t>> taken(static_cast<size_t>(groups));  // of each group's chunks
  for (int64_t i = 0; i < groups; ++i) taken[i] = plan.groups[i];
  std::unique_ptr<Arena> arena = take(flow, plan.largest, sets, scratch, threads);
  SpinBarrier barrier;
  run_team(threads, [&](int rank, int size) {
    if (plan.shared) {
      const Team team = {rank, size, &barrier, aside};
      for (const Chunk& chunk : plan.chunks) {
        Walk(model, call, plan, live, tier, arena->set(model, 0), arena->scratch(rank), team, chunk).go();
      }
    } else {
      // Its own group, then what is left of others': a core that others want too may be late with its own.
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t group = (rank + i) % groups;
        for (int64_t next = taken[group]++; next < plan.groups[group + 1]; next = taken[group]++) {
          const Buffers& buffers = arena->set(model, rank);
          Walk(model, call, plan, live, tier, buffers, arena->scratch(rank), Team(), plan.chunks[next]).go();
        }
      }
    }
    if (aside != nullptr) aside->finish(rank);
  });
  give(std::move(arena));
}

std::unique_ptr<Arena> Encoder::take(const Flow& flow, int64_t rows, int64_t sets, int64_t scratch, int64_t threads) {
  {
    const std::lock_guard<std::mutex> lock(mutex_of(Guarded::arenas));
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
  const std::lock_guard<std::mutex> lock(mutex_of(Guarded::arenas));
  if (spare_.size() < kSpare) spare_.push_back(std::move(arena));
}

}  // namespace distilbert_fast
