#include "cpu/isa/vec_avx512.h"

#include "cpu/isa/tier.h"

#include "cpu/attention/attention_pairs.h"
#include "cpu/gemm/gemm_amx.h"

namespace distilbert_fast {
namespace {

constexpr Kernels table() {
  Kernels kernels = common_kernels();
  kernels.gemm_int8 = gemm_amx<AmxInt8>;
  kernels.gemm_codebook16 = gemm_amx<AmxInt8, ExpandedPanels>;
  kernels.gemm_bfloat16 = gemm_amx<AmxBFloat16>;
  kernels.reads_bfloat16 = true;
  kernels.pack_pair_panels = pack_pair_panels;
  kernels.copy_pair_rows = copy_pair_rows;
  kernels.attention_forward = attention_pairs_forward<TileProduct>;
  return kernels;
}

}  // namespace

constexpr Kernels kernels_amx = table();

}  // namespace distilbert_fast
