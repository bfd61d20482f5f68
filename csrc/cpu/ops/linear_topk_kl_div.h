// Checked entry of the losses of linear_topk_kl_div: see ops/linear_topk_kl_div.py for the contract,
// linear_topk_kl_div_rows.h for the arithmetic.
#pragma once

#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// Throws std::invalid_argument before logits or outputs are touched if something, ids and labels too, makes no sense.
// The slots of the call are made here.
void linear_topk_kl_div(LinearTopKKlDivRows call, int threads);

}  // namespace distilbert_fast
