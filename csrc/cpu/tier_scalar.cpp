#include "vec_scalar.h"

#include "vec_math.h"

#include "kl_div_rows.h"

#include "linear_kl_div_rows.h"

#include "matmul.h"

#include "attention_heads.h"

#include "attention_backward_heads.h"

namespace distilbert_fast {

const Kernels kernels_scalar = {kl_div_forward, kl_div_backward, linear_kl_div, attention_forward, attention_backward};

}  // namespace distilbert_fast
