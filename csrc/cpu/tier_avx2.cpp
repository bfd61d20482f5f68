#include "vec_avx2.h"

#include "vec_math.h"

#include "gelu.h"
#include "gemm_rows.h"
#include "gemm_tile_float.h"
#include "gemm_tile_int8_avx2.h"
#include "kl_div_rows.h"

namespace distilbert_fast {

const Kernels kernels_avx2 = {
    kl_div_forward, kl_div_backward, gemm_widened, gemm<FloatTile<BFloat16Weights>>, gemm<FloatTile<FloatWeights>>, 0,
    false,
};

}  // namespace distilbert_fast
