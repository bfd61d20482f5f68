#include "linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "isa.h"
#include "parallel.h"

namespace distilbert_fast {
namespace {

constexpr int64_t kGroupBytes = 512 << 10;  // of packed panels that stay in a second cache while rows pass by
constexpr int64_t kRows = 48;               // that pass by together, as long as they stay in a first or second cache
constexpr int64_t kSumBlocks = 24;          // summed at once: longer chains of float32 sums lose digits

void require(bool holds, const std::string& expected, const std::string& given) {
  if (!holds) refuse("linear", expected, given);
}

void check(const LinearProduct& call) {
  require(call.rows >= 0 && call.columns >= 0 && call.k >= 0, "rows, columns and k must be 0 or more",
          std::to_string(call.rows) + ", " + std::to_string(call.columns) + " and " + std::to_string(call.k));
  require(std::max({call.rows, call.columns, call.k}) <= INT32_MAX, "rows, columns and k must fit in 31 bits",
          std::to_string(call.rows) + ", " + std::to_string(call.columns) + " and " + std::to_string(call.k));
  const auto check_strides = [](const char* name, int64_t row, int64_t step) {
    require(row >= 0 && step >= 0 && (row == 1 || step == 1), std::string(name) + " must have a stride of 1",
            std::to_string(row) + " and " + std::to_string(step));
  };
  check_strides("a", call.a_row, call.a_step);
  check_strides("b", call.b_row, call.b_step);
  if (call.rows == 0 || call.columns == 0) return;
  require(call.out != nullptr, "out must point to memory", "null");
  require(call.k == 0 || (call.a != nullptr && call.b != nullptr), "a and b must point to memory", "null");
}

// A as the kernels read it: rows of whole blocks of K that end with zeros.
struct LeftSide {
  const float* data;
  int64_t stride;  // elements
  std::unique_ptr<Buffer> copy;
};

LeftSide left_side(const LinearProduct& call, const Kernels& tier, int64_t blocks, int threads) {
  const int64_t stride = blocks * 16;
  if (call.a_step == 1 && call.k == stride) return {call.a, call.a_row, nullptr};
  auto copy = std::make_unique<Buffer>(call.rows * stride * 4 + 64);
  float* out = static_cast<float*>(copy->data());
  const int64_t grain = round_up(1 + kGrainElements / stride, 16);
  parallel_rows(call.rows, grain, threads, [&](int64_t begin, int64_t end) {
    tier.copy_rows({call.a + begin * call.a_row, call.a_row, call.a_step}, end - begin, call.k, out + begin * stride,
                   stride);
  });
  return {out, stride, std::move(copy)};
}

}  // namespace

void linear_product(const LinearProduct& call, int threads) {
  check(call);
  if (call.rows == 0 || call.columns == 0) return;
  threads = usable_threads(threads);
  const Kernels& tier = kernels();
  const int64_t blocks = std::max<int64_t>(1, (call.k + 15) / 16), panel_bytes = blocks * kBlockBytes;
  const LeftSide a = left_side(call, tier, blocks, threads);

  // A thread packs a group of panels into its own cache and lets all rows pass by: each weight is packed once.
  const int64_t panels = (call.columns + kPanelColumns - 1) / kPanelColumns;
  int64_t group = std::max<int64_t>(1, kGroupBytes / panel_bytes);
  group = std::min(group, std::max<int64_t>(1, panels / (2 * std::max(threads, 1))));
  const int64_t padded = panels * kPanelColumns;
  std::vector<float> bias(static_cast<size_t>(2 * padded));  // behind the bias, none: for sums that go on
  if (call.bias != nullptr) std::copy_n(call.bias, call.columns, bias.data());

  const int64_t groups = (panels + group - 1) / group;
  parallel_rows(groups, 1, threads, group * panel_bytes, [&](int64_t begin, int64_t end, void* scratch) {
    auto* const packed = static_cast<uint8_t*>(scratch);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * group, last = std::min(panels, first + group);
      for (int64_t p = first; p < last; ++p) {
        const int64_t column = p * kPanelColumns;
        tier.pack_panel({call.b + column * call.b_row, call.b_row, call.b_step},
                        std::min(kPanelColumns, call.columns - column), call.k,
                        reinterpret_cast<float*>(packed + (p - first) * panel_bytes));
      }
      Gemm gemm = {};
      gemm.weights = {packed, nullptr, nullptr, nullptr, blocks, call.columns - first * kPanelColumns};
      gemm.a = reinterpret_cast<const uint8_t*>(a.data);
      gemm.a_stride = a.stride * 4;
      gemm.out = call.out + first * kPanelColumns;
      gemm.out_stride = gemm.residual_stride = call.columns;
      gemm.output = Output::float32;
      gemm.block_ranges = 1;
      for (int64_t row = 0; row < call.rows; row += kRows) {
        const int64_t stop = std::min(call.rows, row + kRows);
        for (int64_t block = 0; block < blocks; block += kSumBlocks) {
          const BlockRange range = {static_cast<int32_t>(block),
                                    static_cast<int32_t>(std::min(blocks, block + kSumBlocks))};
          gemm.blocks = &range;
          gemm.weights.bias = bias.data() + first * kPanelColumns + (block == 0 ? 0 : padded);
          gemm.residual = block == 0 && !call.add ? nullptr : gemm.out;
          tier.gemm_float32(gemm, row, stop, 0, last - first, nullptr);
        }
      }
    }
  });
}

}  // namespace distilbert_fast
