// Which groups of K a tier that multiplies by vpmaddubsw reads together; see gemm_tile_int8_avx2.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/gemm.h"
#include "cpu/isa/kernels.h"

namespace distilbert_fast {

// The memory that the `matches` of these layers of int8 or codebook16 point to from here on. 0.5 ns a weight on a
// thread.
std::vector<uint32_t> match_groups(const std::vector<PackedLinear*>& layers, const Kernels& tier, int threads);

// Those of one layer, whose blob must outlive them.
class LayerMatches {
 public:
  // Of a blob of such a kind that pack_linear filled; none where the tier in use reads none. Throws as checked_linear.
  LayerMatches(Weights kind, const uint8_t* blob, int64_t blob_bytes, int64_t columns, int64_t k);

  LayerMatches(const LayerMatches&) = delete;

  bool are_of(const PackedLinear& layer) const {
    return layer.panels == layer_.panels && layer.columns == layer_.columns && layer.blocks == layer_.blocks;
  }
  // Null where there are none.
  const uint32_t* data() const { return layer_.matches; }

 private:
  PackedLinear layer_;
  std::vector<uint32_t> memory_;
};

}  // namespace distilbert_fast
