// Checked entries of cosine_loss: see ops/cosine_loss.py for the contract, cosine_loss_rows.h for the arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throw std::invalid_argument before any memory is touched if sizes or pointers make no sense.
void cosine_loss_forward(const CosineForwardRows& call, int64_t rows, int threads);
void cosine_loss_backward(const CosineBackwardRows& call, int64_t rows, int threads);

}  // namespace distilbert_fast
