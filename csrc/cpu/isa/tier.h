// The kernels that are written once over Vec, each after those that it uses, and their table. A tier_<isa>.cpp includes
// its vec_<isa>.h, this, then what that tier alone has; nothing else includes a header of this list.
//
// A table is a constant: nothing of a tier may run at import, where the processor may lack its instructions.
#pragma once

// clang-format off: in this order
#include "cpu/isa/vec_math.h"
#include "cpu/ops/quantize_rows.h"
#include "cpu/ops/fit_scale_rows.h"
#include "cpu/ops/layer_norm_rows.h"
#include "cpu/ops/layer_norm_gradient_rows.h"
#include "cpu/ops/embedding_rows.h"
#include "cpu/ops/cosine_loss_rows.h"
#include "cpu/ops/kl_div_rows.h"
#include "cpu/ops/linear_kl_div_rows.h"
#include "cpu/ops/linear_topk_kl_div_rows.h"
#include "cpu/gemm/gelu.h"
#include "cpu/gemm/gemm_rows.h"
#include "cpu/gemm/gemm_tile_float.h"
#include "cpu/gemm/gemm_pack_rows.h"
#include "cpu/gemm/matmul.h"
#include "cpu/ops/codebook_linear_rows.h"
#include "cpu/attention/attention_heads.h"
#include "cpu/attention/attention_backward_heads.h"
// clang-format on

namespace distilbert_fast {
namespace {

constexpr Kernels common_kernels() {
  Kernels kernels = {};
  kernels.kl_div_forward = kl_div_forward;
  kernels.kl_div_backward = kl_div_backward;
  kernels.linear_kl_div = linear_kl_div;
  kernels.linear_topk_kl_div = linear_topk_kl_div;
  kernels.quantize = quantize;
  kernels.fit_scale = fit_scale;
  kernels.layer_norm_forward = layer_norm_forward;
  kernels.attention_forward = attention_forward;
  kernels.attention_backward = attention_backward;
  kernels.embedding_forward = embedding_forward;
  kernels.add_coded_rows = add_coded_rows;
  kernels.layer_norm_backward = layer_norm_backward;
  kernels.embedding_backward = embedding_backward;
  kernels.cosine_loss_forward = cosine_loss_forward;
  kernels.cosine_loss_backward = cosine_loss_backward;
  kernels.codebook_linear = codebook_linear;
  kernels.gemm_bfloat16 = gemm<FloatTile<BFloat16Weights>>;
  kernels.gemm_float32 = gemm<FloatTile<FloatWeights>>;
  kernels.pack_panels = pack_panels;
  kernels.copy_rows = copy_rows;
  return kernels;
}

}  // namespace
}  // namespace distilbert_fast
