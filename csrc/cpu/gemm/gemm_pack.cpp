#include "cpu/gemm/gemm_pack.h"

#include <cstring>
#include <string>

#include "cpu/check.h"
#include "cpu/isa/bfloat16.h"

namespace distilbert_fast {
namespace {

void require(bool holds, const char* expected, const std::string& given) {
  if (!holds) refuse("pack", expected, given);
}

// A column of weights: groups of 32 bits lie 64 bytes apart, a block behind 16 of them.
template <class T, class Read>
void fill_column(uint8_t* column, int64_t k, const Read& read) {
  constexpr int64_t group = 4 / sizeof(T);
  for (int64_t c = 0; c < k; c += group) {
    T values[group] = {};
    for (int64_t i = 0; i < group && c + i < k; ++i) values[i] = read(c + i);
    std::memcpy(column + c / group / 16 * kBlockBytes + c / group % 16 * 64, values, sizeof values);
  }
}

int64_t padded(int64_t columns) { return round_up(columns, kPanelColumns); }

int64_t table_bytes(Weights kind, int64_t columns) {
  return kind == Weights::codebook16 ? padded(columns) / 4 * 16 : 0;
}

}  // namespace

int64_t packed_bytes(Weights kind, int64_t columns, int64_t k) {
  const int code = static_cast<int>(kind);
  require(0 <= code && code <= 3, "weights must be 0 (int8), 1 (bfloat16), 2 (float32) or 3 (codebook16)",
          std::to_string(code));
  require(columns >= 0 && k >= 0, "columns and k must be 0 or more",
          std::to_string(columns) + " and " + std::to_string(k));
  require(columns <= INT32_MAX && k <= INT32_MAX, "columns and k must fit in 31 bits",
          std::to_string(columns) + " and " + std::to_string(k));
  require(!reads_codes(kind) || k < 1 << 17, "k must be at most 131071 for int32 to hold the sums of int8",
          std::to_string(k));
  require(kind != Weights::codebook16 || (k % block_elements(kind) == 0 && columns % 4 == 0),
          "columns must be a multiple of 4 and k one of 64 for codebook16",
          std::to_string(columns) + " and " + std::to_string(k));
  const int64_t blocks = (k + block_elements(kind) - 1) / block_elements(kind);
  return padded(columns) / kPanelColumns * blocks * block_bytes(kind) + table_bytes(kind, columns) +
         3 * 4 * padded(columns);
}

PackedLinear packed_linear(Weights kind, const uint8_t* blob, int64_t columns, int64_t k) {
  const int64_t blocks = (k + block_elements(kind) - 1) / block_elements(kind);
  const uint8_t* tables = blob + padded(columns) / kPanelColumns * blocks * block_bytes(kind);
  const uint8_t* sums = tables + table_bytes(kind, columns);
  return {kind,
          blob,
          reinterpret_cast<const int32_t*>(sums),
          reinterpret_cast<const float*>(sums + 4 * padded(columns)),
          reinterpret_cast<const float*>(sums + 8 * padded(columns)),
          blocks,
          columns,
          nullptr,
          kind == Weights::codebook16 ? tables : nullptr};
}

PackedLinear checked_linear(Weights kind, const uint8_t* blob, int64_t blob_bytes, int64_t columns, int64_t k) {
  const int64_t bytes = packed_bytes(kind, columns, k);
  require(blob_bytes == bytes, ("the blob must be of " + std::to_string(bytes) + " bytes").c_str(),
          std::to_string(blob_bytes));
  require(blob != nullptr || bytes == 0, "the blob must point to memory", "null");
  return packed_linear(kind, blob, columns, k);
}

void pack_linear(Weights kind, const PackSource& source, int64_t columns, int64_t k, uint8_t* blob,
                 int64_t blob_bytes) {
  const PackedLinear packed = checked_linear(kind, blob, blob_bytes, columns, k);
  require(source.weights != nullptr || columns * k == 0, "weights must point to memory", "null");
  require(kind != Weights::codebook16 || source.tables != nullptr || columns == 0, "tables must point to memory",
          "null");
  if (blob_bytes == 0) return;
  std::memset(blob, 0, static_cast<size_t>(blob_bytes));
  int32_t* sums = const_cast<int32_t*>(packed.column_sums);
  float* scale = const_cast<float*>(packed.scale);
  float* bias = const_cast<float*>(packed.bias);

  if (kind == Weights::codebook16) std::memcpy(const_cast<uint8_t*>(packed.tables), source.tables, columns / 4 * 16);

  for (int64_t f = 0; f < columns; ++f) {
    uint8_t* const panel = blob + f / kPanelColumns * packed.panel_bytes();
    uint8_t* const column = panel + place_in_panel(f);
    const auto at = [&](int64_t c) { return f * source.row_stride + c * source.column_stride; };
    uint32_t sum = 0;
    if (kind == Weights::int8) {
      fill_column<int8_t>(column, k, [&](int64_t c) {
        const int8_t w = static_cast<const int8_t*>(source.weights)[at(c)];
        sum += static_cast<uint32_t>(static_cast<int32_t>(w));
        return w;
      });
    } else if (kind == Weights::codebook16) {
      const auto* const codes = static_cast<const uint8_t*>(source.weights);
      const auto* const table = reinterpret_cast<const int8_t*>(packed.tables_at(f - f % 4));
      for (int64_t c = 0; c < k; ++c) {
        const uint8_t code = codes[at(c)];
        if (code >= 16) refuse("pack", "codes must be below 16", std::to_string(code));
        panel[c / 4 * 64 + f % 16 * 4 + c % 4] |= static_cast<uint8_t>(code << f % kPanelColumns / 16 * 4);
        sum += static_cast<uint32_t>(static_cast<int32_t>(table[code]));
      }
    } else if (kind == Weights::float32) {
      fill_column<float>(column, k, [&](int64_t c) { return static_cast<const float*>(source.weights)[at(c)]; });
    } else if (source.is_float32) {
      fill_column<uint16_t>(
          column, k, [&](int64_t c) { return to_bfloat16(static_cast<const float*>(source.weights)[at(c)]).bits; });
    } else {
      fill_column<uint16_t>(column, k, [&](int64_t c) { return static_cast<const uint16_t*>(source.weights)[at(c)]; });
    }
    sums[f] = static_cast<int32_t>(sum);
    scale[f] = source.scale == nullptr ? 1.0f : source.scale[f];
    bias[f] = source.bias == nullptr ? 0.0f : source.bias[f];
  }
}

}  // namespace distilbert_fast
