// Checked entries of kl_div: see ops/kl_div.py for the contract, kl_div_rows.h for the arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throw std::invalid_argument before any memory is touched if sizes, pointers or temperature make no sense.
void kl_div_forward(KlDivForward call, bool mean, int threads);
void kl_div_backward(KlDivBackward call, int threads);

}  // namespace distilbert_fast
