#include "cpu/encoder/encoder_plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

namespace distilbert_fast {
namespace {

// A chunk's activations stay in a core's second cache, and yet each weight serves this many tokens on its way there.
constexpr int64_t kChunkTokens = 128;
// Below this a thread would spend longer fetching all weights than multiplying with them.
constexpr int64_t kTokensToGoAlone = 96;
// Going alone wastes what the fullest thread has more than the others; sharing wastes about this.
constexpr double kBalanced = 0.9;

void require_index(const char* argument, int64_t index, const EmbeddingTable& table) {
  if (0 <= index && index < table.rows) return;
  throw std::invalid_argument("engine: " + std::string(argument) + " must be in [0, " + std::to_string(table.rows) +
                              "), got " + std::to_string(index));
}

bool is_token(const EncoderCall& call, int64_t place) {
  if (call.mask == nullptr) return true;
  const uint8_t* bytes = static_cast<const uint8_t*>(call.mask) + place * call.mask_bytes;
  return std::any_of(bytes, bytes + call.mask_bytes, [](uint8_t byte) { return byte != 0; });
}

int64_t id_at(const EncoderCall& call, int64_t place) {
  return call.ids_are_int64 ? static_cast<const int64_t*>(call.ids)[place]
                            : static_cast<const int32_t*>(call.ids)[place];
}

// Time of a sequence: its products with the weights, and attention's with itself.
double cost(int64_t length) { return static_cast<double>(length) * static_cast<double>(1150 + length); }

// For each thread the sequences it takes, longest first to whoever has least; empty if that would not be even.
std::vector<std::vector<int64_t>> deal(const std::vector<int64_t>& lengths, int64_t tokens, int threads) {
  std::vector<int64_t> order;
  for (size_t b = 0; b < lengths.size(); ++b) {
    if (lengths[b] > 0) order.push_back(static_cast<int64_t>(b));
  }
  if (threads <= 1) return {order};
  if (tokens < kTokensToGoAlone * threads || static_cast<int64_t>(order.size()) < threads) return {};
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<std::vector<int64_t>> hands(threads);
  std::vector<double> load(threads, 0.0);
  for (const int64_t b : order) {
    const auto least = std::min_element(load.begin(), load.end()) - load.begin();
    hands[least].push_back(b);
    load[least] += cost(lengths[b]);
  }
  const double total = std::accumulate(load.begin(), load.end(), 0.0);
  if (total < kBalanced * threads * *std::max_element(load.begin(), load.end())) return {};
  return hands;
}

// Appends the tokens of a sequence, or its padded positions.
void append(const EncoderModel& model, const EncoderCall& call, int64_t b, bool padding, Plan* plan) {
  int64_t seen = 0;  // RoBERTa's count of ids that are not padding's, masked or not
  for (int64_t t = 0; t < call.length; ++t) {
    const int64_t place = b * call.length + t;
    const int64_t id = id_at(call, place);
    const bool counts = id != model.padding_idx;
    seen += counts ? 1 : 0;
    if (is_token(call, place) == padding) continue;
    int64_t position = t;
    if (call.position_ids != nullptr) {
      position = call.position_ids[b * call.position_stride + t];
    } else if (model.padding_idx >= 0) {
      position = (counts ? seen : 0) + model.padding_idx;
    }
    const int64_t type = call.token_type_ids == nullptr ? 0 : call.token_type_ids[b * call.token_type_stride + t];
    require_index("input_ids", id, model.word);
    require_index("position_ids", position, model.position);
    if (model.token_type.data != nullptr) require_index("token_type_ids", type, model.token_type);
    plan->ids.push_back(id);
    plan->positions.push_back(position);
    plan->types.push_back(type);
    plan->places.push_back(place);
  }
}

}  // namespace

Plan make_plan(const EncoderModel& model, const EncoderCall& call, int threads) {
  Plan plan;
  std::vector<int64_t> lengths(call.batch);  // positions to compute
  int64_t tokens = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t t = 0; t < call.length; ++t) lengths[b] += call.padding || is_token(call, b * call.length + t) ? 1 : 0;
    tokens += lengths[b];
  }

  std::vector<std::vector<int64_t>> hands = deal(lengths, tokens, threads);
  plan.shared = hands.empty();
  if (plan.shared) {
    hands.resize(1);
    for (int64_t b = 0; b < call.batch; ++b) {
      if (lengths[b] > 0) hands[0].push_back(b);
    }
  }

  for (auto* numbers : {&plan.ids, &plan.positions, &plan.types, &plan.places}) numbers->reserve(tokens);
  const int64_t limit = plan.shared ? kChunkTokens * threads : kChunkTokens;
  const auto here = [&] { return static_cast<int64_t>(plan.ids.size()); };
  plan.groups.push_back(0);
  for (const auto& hand : hands) {
    for (size_t first = 0, end = 0; first < hand.size(); first = end) {
      int64_t size = 0;
      while (end < hand.size() && (end == first || size + lengths[hand[end]] <= limit)) {
        size += lengths[hand[end]];
        plan.longest = std::max(plan.longest, lengths[hand[end]]);
        ++end;
      }
      Chunk chunk = {here(), size, 0, static_cast<int64_t>(end - first), static_cast<int64_t>(plan.offsets.size())};
      for (const bool padding : {false, true}) {
        auto& offsets = padding ? plan.padding_offsets : plan.offsets;
        offsets.push_back(static_cast<int32_t>(here() - chunk.first_token));
        for (size_t i = first; i < end; ++i) {
          if (!padding || call.padding) append(model, call, hand[i], padding, &plan);
          offsets.push_back(static_cast<int32_t>(here() - chunk.first_token));
        }
        if (!padding) chunk.keys = here() - chunk.first_token;
      }
      plan.chunks.push_back(chunk);
      plan.largest = std::max(plan.largest, size);
    }
    plan.groups.push_back(static_cast<int64_t>(plan.chunks.size()));
  }
  return plan;
}

}  // namespace distilbert_fast
