// Which groups of K a tier that multiplies by vpmaddubsw reads together; see gemm_tile_int8_avx2.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// The memory that the `matches` of these int8 layers point to from here on. 0.5 ns a weight on a thread.
std::vector<uint32_t> match_groups(const std::vector<PackedLinear*>& layers, const Kernels& tier, int threads);

}  // namespace distilbert_fast
