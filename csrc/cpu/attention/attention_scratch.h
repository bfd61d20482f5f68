// The working memory of one (sequence, head) pair of attention, the same for every tier.
#pragma once

#include <cstdint>

namespace distilbert_fast {
namespace {

constexpr int64_t kAttentionQueries = 24;  // computed at a time
constexpr int64_t kAttentionPanel = 32;    // keys side by side in a panel of transposed keys [D, 32]
constexpr int64_t kPairQueries = 32;       // computed at a time where products are of pairs of bfloat16

constexpr int64_t whole_panels(int64_t n) { return (n + kAttentionPanel - 1) / kAttentionPanel * kAttentionPanel; }

// Sizes in floats; every part is a whole number of panels, so that all stay aligned.
struct AttentionSizes {
  int64_t length, tokens, columns, scores;

  AttentionSizes(int64_t longest, int64_t head_size)
      : length(whole_panels(longest)),
        tokens(length),                    // int32: where the tokens of the sequence are
        columns(whole_panels(head_size)),  // from one packed row to the next
        scores(length + 16) {}             // the same for a row of scores: 16 more, lest the rows share cache sets

  int64_t forward() const {
    const int64_t keys = length * columns, values = length * columns;
    const int64_t floats = keys + values + kAttentionQueries * (columns + scores) + whole_panels(kAttentionQueries);
    const int64_t output = kPairQueries * kAttentionPanel;
    const int64_t pairs = (keys + values + kPairQueries * columns) / 2 + kPairQueries * scores + output + kPairQueries;
    return tokens + (floats > pairs ? floats : pairs);
  }
  int64_t backward() const { return tokens + 5 * length * columns + 2 * kAttentionQueries * (columns + scores); }
};

}  // namespace
}  // namespace distilbert_fast
