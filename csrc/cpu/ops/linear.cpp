#include "cpu/ops/entries.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/check.h"
#include "cpu/isa/isa.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

constexpr int64_t kGroupBytes = 512 << 10;  // of packed panels that stay in a second cache while rows pass by
constexpr int64_t kRows = 48;               // that pass by together, as long as they stay in a first or second cache
constexpr int64_t kPairRows = 96;           // the same of bfloat16; a multiple of kRowUnit
constexpr int64_t kSumBlocks = 24;          // summed at once: longer chains of float32 sums lose digits
constexpr int64_t kSumBlocksOfFewRows = 8;  // of fewer than kRows, which MKL sums in many parts at once
constexpr int64_t kPairDepth = 4096;        // of K at once in bfloat16: panels of more leave the caches

void require(bool holds, const std::string& expected, const std::string& given) {
  if (!holds) refuse("linear", expected, given);
}

bool has_bfloat16(const LinearProduct& call) {
  return call.a_dtype == DType::bfloat16 || call.b_dtype == DType::bfloat16 || call.out_dtype == DType::bfloat16;
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
  for (const DType dtype : {call.a_dtype, call.b_dtype, call.out_dtype}) check_dtype("linear", dtype);
  require(!has_bfloat16(call) || multiplies_bfloat16(), "the tier in use must multiply bfloat16", isa());
  check_strides("a", call.a_row, call.a_step);
  check_strides("b", call.b_row, call.b_step);
  if (call.rows == 0 || call.columns == 0) return;
  require(call.out != nullptr, "out must point to memory", "null");
  require(call.k == 0 || (call.a != nullptr && call.b != nullptr), "a and b must point to memory", "null");
}

// A product over all of K, or over a part of it.
struct Part : LinearProduct {
  bool pairs;          // of bfloat16 are multiplied
  const void* before;  // what the sums go on from, as out lies, maybe its own memory; or null
  DType before_dtype;
};

// A as the kernels read it: rows of whole blocks of K that end with zeros, and rows to read, not to use, behind the
// last. What does not lie so is copied: all rows, or those behind the last whole kRowUnit.
struct LeftSide {
  const uint8_t* data;
  int64_t data_stride;  // bytes
  int64_t copied;       // the first row that lies in the copy
  std::unique_ptr<Buffer> copy;
  int64_t copy_stride;
};

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

const uint8_t* at(const void* data, DType dtype, int64_t element) {
  return static_cast<const uint8_t*>(data) + element * size_of(dtype);
}

LeftSide left_side(const Part& call, int64_t blocks, int threads) {
  const Kernels& tier = kernels();
  const DType read = call.pairs ? DType::bfloat16 : DType::float32;
  LeftSide a = {static_cast<const uint8_t*>(call.a), call.a_row * size_of(call.a_dtype), 0, nullptr, blocks * 64};
  const bool as_read = call.a_dtype == read && call.a_step == 1 && call.k * size_of(read) == blocks * 64;
  const bool aligned = reinterpret_cast<uintptr_t>(a.data) % 4 == 0 && a.data_stride % 4 == 0;
  if (as_read && aligned) a.copied = call.pairs ? call.rows / kRowUnit * kRowUnit : call.rows;
  const int64_t rows = call.rows - a.copied;
  if (rows == 0) return a;

  a.copy = std::make_unique<Buffer>(round_up(rows, kRowUnit) * a.copy_stride);
  uint8_t* const out = static_cast<uint8_t*>(a.copy->data());
  const auto copy_rows = call.pairs ? tier.copy_pair_rows : tier.copy_rows;
  const int64_t grain = round_up(1 + kGrainElements / (blocks * 16), 16);
  parallel_rows(rows, grain, threads, [&](int64_t begin, int64_t end) {
    const uint8_t* const from = at(call.a, call.a_dtype, (a.copied + begin) * call.a_row);
    copy_rows({from, call.a_dtype, call.a_row, call.a_step}, end - begin, call.k, out + begin * a.copy_stride,
              a.copy_stride);
  });
  return a;
}

void multiply(const Part& call, int threads) {
  const Kernels& tier = kernels();
  const Weights kind = call.pairs ? Weights::bfloat16 : Weights::float32;
  const int64_t elements = block_elements(kind);
  const int64_t blocks = std::max<int64_t>(1, (call.k + elements - 1) / elements), panel_bytes = blocks * kBlockBytes;
  const LeftSide a = left_side(call, blocks, threads);

  // A thread packs a group of panels into its own cache and lets all rows pass by: each weight is packed once.
  const int64_t panels = (call.columns + kPanelColumns - 1) / kPanelColumns;
  int64_t group = std::max<int64_t>(1, kGroupBytes / panel_bytes);
  group = std::min(group, std::max<int64_t>(1, panels / (2 * std::max(threads, 1))));
  const int64_t padded = panels * kPanelColumns;
  std::vector<float> bias(static_cast<size_t>(2 * padded));  // behind the bias, none: for sums that go on
  if (call.bias != nullptr) std::copy_n(call.bias, call.columns, bias.data());

  const int64_t sum_blocks = call.pairs ? blocks : call.rows < kRows ? kSumBlocksOfFewRows : kSumBlocks;
  const int64_t rows_at_once = call.pairs ? kPairRows : kRows;
  const auto pack_panels = call.pairs ? tier.pack_pair_panels : tier.pack_panels;
  const auto gemm_rows = call.pairs ? tier.gemm_bfloat16 : tier.gemm_float32;
  const int64_t groups = (panels + group - 1) / group;
  parallel_rows(groups, 1, threads, group * panel_bytes, [&](int64_t begin, int64_t end, void* scratch) {
    auto* const packed = static_cast<uint8_t*>(scratch);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * group, last = std::min(panels, first + group);
      const uint8_t* const from = at(call.b, call.b_dtype, first * kPanelColumns * call.b_row);
      pack_panels({from, call.b_dtype, call.b_row, call.b_step},
                  std::min(last * kPanelColumns, call.columns) - first * kPanelColumns, call.k, packed);
      Gemm gemm = {};
      gemm.weights = {kind, packed, nullptr, nullptr, nullptr, blocks, call.columns - first * kPanelColumns};
      gemm.out_stride = gemm.residual_stride = call.columns;
      gemm.output = call.out_dtype == DType::bfloat16 ? Output::bfloat16 : Output::float32;
      gemm.block_ranges = 1;
      for (int64_t row = 0; row < call.rows;) {
        const bool copied = row >= a.copied;
        const int64_t rows = std::min(rows_at_once, (copied ? call.rows : a.copied) - row);
        const auto* copy = copied ? static_cast<const uint8_t*>(a.copy->data()) : nullptr;
        gemm.a = copied ? copy + (row - a.copied) * a.copy_stride : a.data + row * a.data_stride;
        gemm.a_stride = copied ? a.copy_stride : a.data_stride;
        const int64_t corner = row * call.columns + first * kPanelColumns;
        gemm.out = static_cast<uint8_t*>(call.out) + corner * size_of(call.out_dtype);
        gemm.residual = call.before == nullptr ? nullptr : at(call.before, call.before_dtype, corner);
        gemm.residual_is_bfloat16 = call.before_dtype == DType::bfloat16;
        for (int64_t block = 0; block < blocks; block += sum_blocks) {
          const BlockRange range = {static_cast<int32_t>(block),
                                    static_cast<int32_t>(std::min(blocks, block + sum_blocks))};
          gemm.blocks = &range;
          gemm.weights.bias = bias.data() + first * kPanelColumns + (block == 0 ? 0 : padded);
          gemm_rows(gemm, 0, rows, 0, last - first, nullptr);
          gemm.residual = gemm.out;  // only float32 has more blocks to come
        }
        row += rows;
      }
    }
  });
}

}  // namespace

bool multiplies_bfloat16() { return kernels().reads_bfloat16; }

void linear_product(const LinearProduct& call, int threads) {
  check(call);
  if (call.rows == 0 || call.columns == 0) return;
  threads = usable_threads(threads);
  Part part = {call, has_bfloat16(call), call.add ? call.out : nullptr, call.out_dtype};
  const int64_t parts = part.pairs ? 1 + call.k / (kPairDepth + 1) : 1;
  const int64_t depth = round_up((call.k + parts - 1) / parts, block_elements(Weights::bfloat16));
  std::unique_ptr<Buffer> sums;  // of the parts but the last, where out is not float32
  if (depth < call.k && call.out_dtype == DType::bfloat16) {
    sums = std::make_unique<Buffer>(call.rows * call.columns * 4);
  }
  bool last = false;
  for (int64_t i = 0; !last; i += depth) {
    last = i + depth >= call.k;
    part.a = at(call.a, call.a_dtype, i * call.a_step);
    part.b = at(call.b, call.b_dtype, i * call.b_step);
    part.k = last ? call.k - i : depth;
    part.out = last || sums == nullptr ? call.out : sums->data();
    part.out_dtype = last ? call.out_dtype : DType::float32;
    multiply(part, threads);
    part.before = part.out;
    part.before_dtype = part.out_dtype;
    part.bias = nullptr;
  }
}

}  // namespace distilbert_fast
