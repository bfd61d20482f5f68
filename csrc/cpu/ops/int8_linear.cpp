#include "cpu/ops/entries.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/check.h"
#include "cpu/gemm/gemm_pack.h"
#include "cpu/gemm/matches.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

void require(bool holds, const std::string& expected, const std::string& given) {
  if (!holds) refuse("int8_linear", expected, given);
}

void check(const Int8Linear& call) {
  require(reads_codes(call.kind), "weights must be 0 (int8) or 3 (codebook16)",
          std::to_string(static_cast<int>(call.kind)));
  require(call.rows >= 0, "rows must be 0 or more", std::to_string(call.rows));
  const int64_t bytes = packed_bytes(call.kind, call.columns, call.k);
  require(call.blob_bytes == bytes, "packed weights must be of " + std::to_string(bytes) + " bytes",
          std::to_string(call.blob_bytes));
  require(0 <= call.output && call.output <= 2, "output must be 0 (float32), 1 (bfloat16) or 2 (codes)",
          std::to_string(call.output));
  const int64_t widest = (call.columns > call.k ? call.columns : call.k) + 2 * kRowUnit;
  require(
      call.rows <= (int64_t{1} << 60) / widest - kRowUnit, "rows · columns and rows · k must fit in 60 bits",
      std::to_string(call.rows) + " rows, " + std::to_string(call.columns) + " columns, k " + std::to_string(call.k));
  const std::pair<const char*, int64_t> strides[] = {{"x_row_stride", call.x_row_stride},
                                                     {"x_column_stride", call.x_column_stride},
                                                     {"x_scale_stride", call.x_scale_stride},
                                                     {"residual_stride", call.residual_stride},
                                                     {"out_scale_stride", call.out_scale_stride}};
  for (const auto& [name, stride] : strides) {
    require(stride >= 0, std::string(name) + " must be 0 or more", std::to_string(stride));
  }
  if (call.rows == 0 || call.columns == 0) return;
  require(call.x != nullptr || call.k == 0, "x must point to memory", "null");
  require(call.x_scale != nullptr, "x_scale must point to memory", "null");
  require(call.blob != nullptr, "packed weights must point to memory", "null");
  require(call.scale != nullptr, "scale must point to memory", "null");
  require(call.out != nullptr, "out must point to memory", "null");
  require(call.output != 2 || call.out_scale != nullptr, "out_scale must point to memory", "null");
  require(call.matches == nullptr || call.matches->are_of(packed_linear(call.kind, call.blob, call.columns, call.k)),
          "matches must be of these packed weights", "others");
}

constexpr int64_t kGrainRows = 256;          // enough for a panel of weights to pay for its way to the cache
constexpr int64_t kGrainProducts = 1 << 19;  // work worth waking a thread for

}  // namespace

void int8_linear(const Int8Linear& call, int threads) {
  check(call);
  if (call.rows == 0 || call.columns == 0) return;
  const Kernels& tier = kernels();
  PackedLinear weights = packed_linear(call.kind, call.blob, call.columns, call.k);
  const int64_t padded = weights.panel_count() * kPanelColumns;  // kernels load whole vectors
  std::vector<float> scale_and_bias(static_cast<size_t>(2 * padded));
  std::copy_n(call.scale, call.columns, scale_and_bias.data());
  if (call.bias != nullptr) std::copy_n(call.bias, call.columns, scale_and_bias.data() + padded);
  weights.scale = scale_and_bias.data();
  weights.bias = scale_and_bias.data() + padded;
  if (call.matches != nullptr) weights.matches = call.matches->data();

  const int64_t row_bytes = weights.blocks * 64;
  const std::unique_ptr<uint8_t[]> memory(new uint8_t[static_cast<size_t>((call.rows + kRowUnit) * row_bytes + 64)]);
  uint8_t* const a =
      memory.get() + 64 - reinterpret_cast<uintptr_t>(memory.get()) % 64;  // a row in as few lines as can be
  const BlockRange all = {0, static_cast<int32_t>(weights.blocks)};
  const Gemm gemm = {weights,
                     a,
                     row_bytes,
                     call.x_scale,
                     call.x_scale_stride,
                     call.gelu ? Activation::gelu : Activation::none,
                     call.residual,
                     call.residual_stride,
                     call.residual_is_bfloat16,
                     call.out,
                     call.columns,
                     static_cast<Output>(call.output),
                     call.out_scale,
                     call.out_scale_stride,
                     0,
                     &all,
                     1,
                     nullptr,
                     nullptr};

  const int64_t copy_grain = 1 + (1 << 16) / (row_bytes + 1);
  parallel_rows(call.rows, copy_grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* out = a + r * row_bytes;
      const int8_t* x = call.x + r * call.x_row_stride;
      for (int64_t c = 0; c < call.k; ++c) out[c] = static_cast<uint8_t>(x[c * call.x_column_stride]) ^ tier.code_flip;
      std::memset(out + call.k, tier.code_flip, static_cast<size_t>(row_bytes - call.k));
    }
  });

  // Few rows: the threads share the panels, so that each weight is read once. Many: they share the rows.
  const int64_t panels = weights.panel_count();
  const bool by_rows = call.rows >= kGrainRows * threads || panels < threads;
  const int64_t units = by_rows ? call.rows : panels;
  const int64_t per_unit = (by_rows ? panels * kPanelColumns : call.rows * kPanelColumns) * row_bytes;
  int64_t grain = (units + threads - 1) / (threads < 1 ? 1 : threads);
  if (by_rows && grain > kGrainRows) grain = kGrainRows;
  if (grain * per_unit < kGrainProducts) grain = 1 + kGrainProducts / (per_unit + 1);
  const GemmKernel kernel = call.kind == Weights::int8 ? tier.gemm_int8 : tier.gemm_codebook16;
  parallel_rows(units, grain, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint8_t[]> scratch(
        new uint8_t[static_cast<size_t>(gemm_scratch_bytes(call.kind, weights.blocks))]);
    if (by_rows) {
      kernel(gemm, begin, end, 0, panels, scratch.get());
    } else {
      kernel(gemm, 0, call.rows, begin, end, scratch.get());
    }
  });
}

}  // namespace distilbert_fast
