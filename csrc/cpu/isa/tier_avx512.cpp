#include "cpu/isa/vec_avx512.h"

#include "cpu/isa/tier.h"

#include "cpu/gemm/gemm_tile_int8_avx512.h"

namespace distilbert_fast {
namespace {

constexpr Kernels table() {
  Kernels kernels = common_kernels();
  kernels.gemm_int8 = gemm<Int8Tile>;
  kernels.gemm_codebook16 = gemm_codes<Int8Tile, CodeTile>;
  kernels.code_flip = 0x80;
  return kernels;
}

}  // namespace

constexpr Kernels kernels_avx512 = table();

}  // namespace distilbert_fast
