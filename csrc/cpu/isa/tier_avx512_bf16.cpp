#include "cpu/isa/vec_avx512.h"

#include "cpu/isa/tier.h"

#include "cpu/attention/attention_pairs.h"
#include "cpu/gemm/gemm_tile_int8_avx512.h"
#include "cpu/gemm/gemm_tile_pairs.h"

namespace distilbert_fast {
namespace {

constexpr Kernels table() {
  Kernels kernels = common_kernels();
  kernels.gemm_int8 = gemm<Int8Tile>;
  kernels.gemm_codebook16 = gemm_codes<Int8Tile, CodeTile>;
  kernels.code_flip = 0x80;
  kernels.gemm_bfloat16 = gemm<PairTile>;
  kernels.reads_bfloat16 = true;
  kernels.pack_pair_panels = pack_pair_panels;
  kernels.copy_pair_rows = copy_pair_rows;
  kernels.attention_forward = attention_pairs_forward<PairProduct>;
  return kernels;
}

}  // namespace

constexpr Kernels kernels_avx512_bf16 = table();

}  // namespace distilbert_fast
