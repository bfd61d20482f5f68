#include "cpu/isa/vec_scalar.h"

#include "cpu/isa/tier.h"

#include "cpu/gemm/gemm_tile_int8_scalar.h"

namespace distilbert_fast {
namespace {

constexpr Kernels table() {
  Kernels kernels = common_kernels();
  kernels.gemm_int8 = gemm<Int8Tile>;
  kernels.gemm_codebook16 = gemm<Int8Tile, ExpandedPanels>;
  kernels.code_flip = 0;
  return kernels;
}

}  // namespace

constexpr Kernels kernels_scalar = table();

}  // namespace distilbert_fast
