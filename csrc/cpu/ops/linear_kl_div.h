// Checked entry of the losses of linear_kl_div: see ops/linear_kl_div.py for the contract, linear_kl_div_rows.h for the
// arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throws std::invalid_argument before logits or outputs are touched if something makes no sense. The slots of the call
// are made here.
void linear_kl_div(LinearKlDivRows call, int threads);

}  // namespace distilbert_fast
