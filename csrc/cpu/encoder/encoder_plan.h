// What a batch comes down to: its tokens in the order they are computed, cut into chunks.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/encoder/encoder.h"

namespace distilbert_fast {

// Some sequences that go through the layers together: their tokens, then, where they are computed, their padded
// positions. Token numbers count in computing order.
struct Chunk {
  int64_t first_token;
  int64_t tokens;  // with the padded ones
  int64_t keys;    // without
  int64_t sequences;
  int64_t first_offset;  // of its offsets in Plan, sequences + 1 of each kind
};

struct Plan {
  std::vector<int64_t> ids, positions, types;  // [N]
  std::vector<int64_t> places;                 // [N]: b · length + t
  std::vector<int32_t> offsets;                // of each sequence's tokens in its chunk
  std::vector<int32_t> padding_offsets;        // of its padded positions; all the same where these are not computed
  std::vector<Chunk> chunks;
  std::vector<int64_t> groups;  // chunks [groups[g], groups[g + 1]) are one thread's own; a single group is everybody's
  int64_t largest = 0;          // tokens of a chunk
  int64_t longest = 0;          // tokens of a sequence
  bool shared = false;          // all threads compute each chunk together
};

// Throws std::invalid_argument for an id or a position outside its table.
Plan make_plan(const EncoderModel& model, const EncoderCall& call, int threads);

}  // namespace distilbert_fast
