// Checked entries of attention: see ops/attention.py for the contract, attention_heads.h for the arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Bytes that a kernel needs for sequences of up to `longest` tokens.
int64_t attention_forward_scratch(int64_t longest, int64_t head_size);
int64_t attention_backward_scratch(int64_t longest, int64_t head_size);

// Throw std::invalid_argument before q, k, v or any output is touched if sizes, offsets, pointers or factors make no
// sense. tokens: N of the packed form.
void attention_forward(const AttentionForward& call, int64_t tokens, int threads);
void attention_backward(const AttentionBackward& call, int64_t tokens, int threads);

}  // namespace distilbert_fast
