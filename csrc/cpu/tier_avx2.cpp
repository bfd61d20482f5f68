#include "vec_avx2.h"

#include "vec_math.h"

#include "cosine_loss_rows.h"
#include "kl_div_rows.h"
#include "quantize_rows.h"

#include "layer_norm_rows.h"

#include "layer_norm_gradient_rows.h"

#include "embedding_rows.h"

namespace distilbert_fast {

const Kernels kernels_avx2 = {kl_div_forward,     kl_div_backward,     quantize,
                              layer_norm_forward, embedding_forward,   layer_norm_backward,
                              embedding_backward, cosine_loss_forward, cosine_loss_backward};

}  // namespace distilbert_fast
