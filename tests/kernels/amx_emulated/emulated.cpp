// Compiled into the module under test: the emulation's counters, and a door to the GEMM kernels of the tier in use.
#include "emulated.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/gemm/gemm_pack.h"
#include "cpu/isa/isa.h"

namespace emulated {

std::atomic<int64_t> threads_with_tiles{0};
std::atomic<int64_t> multiplications{0};

void fault(const char* what) {
  std::fprintf(stderr, "AMX, emulated: %s\n", what);
  std::abort();
}

}  // namespace emulated

using namespace distilbert_fast;

extern "C" {

struct GemmArguments {
  int64_t weights;  // 0 int8, 1 bfloat16, 2 float32, 3 codebook16
  const uint8_t* blob;
  int64_t columns, k;
  const uint8_t* a;
  int64_t a_stride;
  const float* a_scale;
  int64_t a_scale_stride;
  int64_t activation;
  const void* residual;
  int64_t residual_stride, residual_is_bfloat16;
  void* out;
  int64_t out_stride, output;
  const float* out_scale;
  int64_t out_scale_stride, out_flip;
  const BlockRange* blocks;
  int64_t block_ranges;
  const int32_t* panels;
  const float* out_factors;
  int64_t row_begin, row_end, panel_begin, panel_end;
};

__attribute__((visibility("default"))) void emulated_gemm(const GemmArguments& x) {
  const Weights weights = static_cast<Weights>(x.weights);
  const PackedLinear packed = packed_linear(weights, x.blob, x.columns, x.k);
  const Gemm gemm = {packed,
                     x.a,
                     x.a_stride,
                     x.a_scale,
                     x.a_scale_stride,
                     static_cast<Activation>(x.activation),
                     x.residual,
                     x.residual_stride,
                     x.residual_is_bfloat16 != 0,
                     x.out,
                     x.out_stride,
                     static_cast<Output>(x.output),
                     x.out_scale,
                     x.out_scale_stride,
                     static_cast<uint8_t>(x.out_flip),
                     x.blocks,
                     x.block_ranges,
                     x.panels,
                     x.out_factors};
  std::vector<uint8_t> scratch(static_cast<size_t>(gemm_scratch_bytes(weights, packed.blocks)));
  const Kernels& tier = kernels();
  const GemmKernel all[] = {tier.gemm_int8, tier.gemm_bfloat16, tier.gemm_float32, tier.gemm_codebook16};
  all[x.weights](gemm, x.row_begin, x.row_end, x.panel_begin, x.panel_end, scratch.data());
}

__attribute__((visibility("default"))) int64_t emulated_code_flip() { return kernels().code_flip; }
__attribute__((visibility("default"))) int64_t emulated_reads_bfloat16() { return kernels().reads_bfloat16; }
__attribute__((visibility("default"))) int64_t emulated_threads_with_tiles() { return emulated::threads_with_tiles; }
__attribute__((visibility("default"))) int64_t emulated_multiplications() { return emulated::multiplications; }
}
