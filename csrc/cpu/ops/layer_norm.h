// Checked entry of layer_norm: see ops/layer_norm.py for the contract, layer_norm_rows.h for the arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throw std::invalid_argument before any memory is touched if sizes, pointers or eps make no sense.
void layer_norm_forward(const LayerNormRows& call, int64_t rows, int threads);
// dweight and dbias are [columns]; call.gradient.sums is not read.
void layer_norm_backward(const LayerNormGradientRows& call, int64_t rows, float* dweight, float* dbias, int threads);

}  // namespace distilbert_fast
