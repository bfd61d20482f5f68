// Which columns and blocks of a layer's weights a call's head mask leaves alive.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/encoder/encoder.h"

namespace distilbert_fast {

// What a layer computes under the head mask of a call: all of it, or not the columns and blocks of heads that are 0.
struct LiveHeads {
  const float* mask = nullptr;        // [heads]; null: all 1
  std::vector<int32_t> qkv_panels;    // only if some are left out
  std::vector<int32_t> query_panels;  // those of them with queries
  std::vector<BlockRange> out_blocks;
};

inline LiveHeads live_heads(const EncoderModel& model, const EncoderLayer& layer, const float* mask) {
  LiveHeads live;
  live.mask = mask;
  const int64_t wide = layer.heads * model.head_size, block = block_elements(layer.out.kind);
  const auto any = [&](int64_t begin, int64_t end) {  // of the columns [begin, end) of the heads
    for (int64_t c = begin; c < end; ++c) {
      if (mask[c / model.head_size] != 0) return true;
    }
    return false;
  };
  const auto panels = [&](int64_t columns, bool masked) {
    std::vector<int32_t> wanted;
    for (int64_t p = 0; p * kPanelColumns < columns; ++p) {
      const int64_t end = std::min(columns, (p + 1) * kPanelColumns);
      bool live = !masked;
      for (int64_t c = p * kPanelColumns; c < end && !live; ++c) live = any(c % wide, c % wide + 1);
      if (live) wanted.push_back(static_cast<int32_t>(p));
    }
    return wanted;
  };
  const bool masked = mask != nullptr && !std::all_of(mask, mask + layer.heads, [](float m) { return m != 0; });
  live.query_panels = panels(wide, masked);
  if (masked) {
    live.qkv_panels = panels(3 * wide, true);
    for (int64_t b = 0; b < layer.out.blocks; ++b) {
      if (!any(b * block, std::min(wide, (b + 1) * block))) continue;
      const auto at = static_cast<int32_t>(b);
      if (!live.out_blocks.empty() && live.out_blocks.back().end == at) {
        live.out_blocks.back().end = at + 1;
      } else {
        live.out_blocks.push_back({at, at + 1});
      }
    }
  } else {
    live.out_blocks.push_back({0, static_cast<int32_t>(layer.out.blocks)});
  }
  return live;
}

}  // namespace distilbert_fast
