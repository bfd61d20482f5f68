#include "cpu/gemm/matches.h"

#include "cpu/gemm/gemm_pack.h"
#include "cpu/isa/isa.h"
#include "cpu/team.h"

namespace distilbert_fast {

std::vector<uint32_t> match_groups(const std::vector<PackedLinear*>& layers, const Kernels& tier, int threads) {
  const auto strips = [](const PackedLinear& layer) { return layer.panel_count() * kPanelColumns / 8; };
  int64_t words = 0;
  for (const PackedLinear* layer : layers) words += strips(*layer) * match_words(layer->blocks);
  std::vector<uint32_t> memory(static_cast<size_t>(words));
  uint32_t* next = memory.data();
  for (PackedLinear* layer : layers) {
    const int64_t n = strips(*layer);
    run_team(threads, [&](int rank, int size) {
      std::vector<uint8_t> scratch(static_cast<size_t>(gemm_scratch_bytes(layer->kind, layer->blocks)));
      tier.match_groups(*layer, n * rank / size, n * (rank + 1) / size, scratch.data(), next);
    });
    layer->matches = next;
    next += n * match_words(layer->blocks);
  }
  return memory;
}

LayerMatches::LayerMatches(Weights kind, const uint8_t* blob, int64_t blob_bytes, int64_t columns, int64_t k)
    : layer_(checked_linear(kind, blob, blob_bytes, columns, k)) {
  if (kernels().match_groups != nullptr) memory_ = match_groups({&layer_}, kernels(), 1);
}

}  // namespace distilbert_fast
