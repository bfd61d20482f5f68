// Checked entry of quantize: see ops/quantize.py for the contract, quantize_rows.h for the arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throws std::invalid_argument before any memory is touched if sizes or pointers make no sense.
void quantize(const QuantizeRows& call, int64_t rows, int threads);

}  // namespace distilbert_fast
