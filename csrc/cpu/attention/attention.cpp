#include "cpu/attention/attention.h"

#include <algorithm>
#include <string>

#include "cpu/attention/attention_scratch.h"
#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

constexpr double kGrainProducts = 1 << 20;  // work worth waking a thread for

void require(bool holds, const std::string& expected, const std::string& given) {
  if (!holds) refuse("attention", expected, given);
}

void check_offsets(const AttentionSequences& sequences, int64_t tokens) {
  const int32_t* offsets = sequences.cu_seqlens;
  require(offsets[0] == 0, "cu_seqlens must be 0 at the start", std::to_string(offsets[0]));
  for (int64_t b = 1; b <= sequences.batch; ++b) {
    if (offsets[b] >= offsets[b - 1]) continue;
    require(false, "cu_seqlens must be non-decreasing",
            std::to_string(offsets[b]) + " after " + std::to_string(offsets[b - 1]) + " at " + std::to_string(b));
  }
  const int32_t last = offsets[sequences.batch];
  require(last == tokens, "cu_seqlens must be N = " + std::to_string(tokens) + " at the end", std::to_string(last));
}

// Returns the longest sequence; 0: there is nothing to do.
int64_t check(const AttentionCall& call, int64_t tokens) {
  const AttentionSequences& sequences = call.sequences;
  require(sequences.batch >= 0, "batch must be 0 or more", std::to_string(sequences.batch));
  require(call.heads >= 0, "heads must be 0 or more", std::to_string(call.heads));
  require(call.head_size >= 1, "head_size must be 1 or more", std::to_string(call.head_size));
  check_dtype("attention", call.dtype);
  check_positive("attention", "scale", call.scale);
  require(call.dropout_p >= 0 && call.dropout_p < 1, "dropout_p must be at least 0 and below 1",
          std::to_string(call.dropout_p));
  int64_t longest = sequences.batch > 0 ? sequences.length : 0;
  if (sequences.cu_seqlens) {
    check_offsets(sequences, tokens);
    longest = 0;
    for (int64_t b = 0; b < sequences.batch; ++b) {
      const int64_t n = sequences.cu_seqlens[b + 1] - sequences.cu_seqlens[b];
      longest = n > longest ? n : longest;
    }
  }
  require(longest >= 0 && longest <= INT32_MAX, "length must be 0 or more and fit in 31 bits", std::to_string(longest));
  require(call.heads <= INT32_MAX && call.head_size <= INT32_MAX, "heads and head_size must fit in 31 bits",
          std::to_string(call.heads) + " and " + std::to_string(call.head_size));
  if (call.heads == 0) return 0;
  const bool present = call.q.data != nullptr && call.k.data != nullptr && call.v.data != nullptr;
  require(longest == 0 || present, "q, k and v must point to memory", "null");
  return longest;
}

int64_t grain(const AttentionCall& call, int64_t longest) {
  const double n = static_cast<double>(longest);
  return 1 + static_cast<int64_t>(kGrainProducts / (n * n * static_cast<double>(call.head_size)));
}

}  // namespace

int64_t attention_forward_scratch(int64_t longest, int64_t head_size) {
  return AttentionSizes(longest, head_size).forward() * static_cast<int64_t>(sizeof(float));
}

int64_t attention_backward_scratch(int64_t longest, int64_t head_size) {
  return AttentionSizes(longest, head_size).backward() * static_cast<int64_t>(sizeof(float));
}

void attention_forward(const AttentionForward& call, int64_t tokens, int threads) {
  const int64_t longest = check(call.call, tokens);
  require(call.o_dtype == DType::float32 || call.o_dtype == DType::bfloat16,
          "o_dtype must be 0 (float32) or 1 (bfloat16)", std::to_string(static_cast<int>(call.o_dtype)));
  if (longest == 0) return;
  require(call.o.data != nullptr, "o must point to memory", "null");
  const Kernels& tier = kernels();
  parallel_rows(call.call.sequences.batch * call.call.heads, grain(call.call, longest), threads,
                attention_forward_scratch(longest, call.call.head_size),
                [&](int64_t begin, int64_t end, void* scratch) { tier.attention_forward(call, begin, end, scratch); });
}

void attention_backward(const AttentionBackward& call, int64_t tokens, int threads) {
  const int64_t longest = check(call.call, tokens), pairs = call.call.sequences.batch * call.call.heads;
  if (call.dm) std::fill_n(call.dm, pairs, 0.0f);
  if (longest == 0) return;
  const bool present = call.g.data && call.dq.data && call.dk.data && call.dv.data;
  require(present, "do, dq, dk and dv must point to memory", "null");
  const Kernels& tier = kernels();
  parallel_rows(pairs, grain(call.call, longest), threads, attention_backward_scratch(longest, call.call.head_size),
                [&](int64_t begin, int64_t end, void* scratch) { tier.attention_backward(call, begin, end, scratch); });
}

}  // namespace distilbert_fast
