// The products by which this tier differs from AVX2; isa.cpp puts them into a copy of that tier's table.
#include "cpu/isa/vec_avx2.h"

// clang-format off: in this order
#include "cpu/isa/vec_math.h"
#include "cpu/ops/quantize_rows.h"
#include "cpu/gemm/gelu.h"
#include "cpu/gemm/gemm_rows.h"
#include "cpu/gemm/gemm_tile_int8_avx_vnni.h"
// clang-format on

namespace distilbert_fast {

constexpr GemmKernel gemm_int8_avx_vnni = gemm<Int8Tile>;
constexpr GemmKernel gemm_codebook16_avx_vnni = gemm_codes<Int8Tile, CodeTile>;

}  // namespace distilbert_fast
