// Linear layers, panel by panel: tiles of sums from gemm_tile_*.h, each finished while it is in the first cache.
//
//     panel → columns of a tile → part of K → rows of a tile
//
// Panels are the outer loop: a panel (24 KiB for K = 768 int8) stays in the first or second cache while the rows pass
// by, and the next one is fetched meanwhile. W is read once, A once a panel.
#pragma once

namespace distilbert_fast {
namespace {

// Weights of the next panel on their way into the second cache, a few lines with each block of this one.
struct Prefetch {
  const uint8_t* next;
  int lines;
  void some() {
    for (int i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

inline Vec sums_of(const float* p) { return load(p); }
inline Vec sums_of(const int32_t* p) { return from_int32(p); }

// y = activation(sum · a_scale · scale + bias) + residual for `rows` rows and `columns` columns, which is stored.
template <class Tile, Activation kActivation>
void finish_as(const Gemm& call, const typename Tile::Sum* sums, int64_t row, int64_t rows, int64_t column,
               int64_t columns) {
  for (int64_t r = row; r < row + rows; ++r, sums += Tile::columns) {
    Vec a_scale = broadcast(1.0f), codes_per_unit = broadcast(0.0f);
    if (Tile::quantized) a_scale = broadcast(call.a_scale[r * call.a_scale_stride]);
    if (call.output == Output::codes && call.out_factors == nullptr) {
      codes_per_unit = broadcast(inverse_of(call.out_scale[r * call.out_scale_stride]));
    }
    for (int64_t c = 0; c < columns; c += Vec::lanes) {
      const int64_t n = columns - c < Vec::lanes ? columns - c : Vec::lanes, f = column + c;
      Vec y = sums_of(sums + c);
      if (Tile::quantized) y = mul(mul(y, a_scale), load(call.weights.scale + f));
      y = add(y, load(call.weights.bias + f));
      if (kActivation == Activation::gelu) y = gelu(y);
      if (kActivation == Activation::gelu_fast) y = gelu_fast(y);
      if (call.residual != nullptr) {
        const int64_t at = r * call.residual_stride + f;
        y = add(y, call.residual_is_bfloat16 ? load_first(static_cast<const bfloat16*>(call.residual) + at, n, 0)
                                             : load_first(static_cast<const float*>(call.residual) + at, n, 0));
      }
      const int64_t at = r * call.out_stride + f;
      if (call.output == Output::float32) {
        float* out = static_cast<float*>(call.out) + at;
        n == Vec::lanes ? store(out, y) : store_first(out, y, n);
      } else if (call.output == Output::bfloat16) {
        bfloat16* out = static_cast<bfloat16*>(call.out) + at;
        n == Vec::lanes ? store(out, y) : store_first(out, y, n);
      } else {
        uint8_t* out = static_cast<uint8_t*>(call.out) + at;
        y = mul(y, call.out_factors == nullptr ? codes_per_unit : load(call.out_factors + f));
        n == Vec::lanes ? store_codes(out, y, call.out_flip) : store_codes_first(out, y, call.out_flip, n);
      }
    }
  }
}

template <class Tile>
void finish(const Gemm& call, const typename Tile::Sum* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t left = call.weights.columns - column;
  const int64_t columns = left < Tile::columns ? left : Tile::columns;
  switch (call.activation) {
    case Activation::none:
      return finish_as<Tile, Activation::none>(call, sums, row, rows, column, columns);
    case Activation::gelu:
      return finish_as<Tile, Activation::gelu>(call, sums, row, rows, column, columns);
    case Activation::gelu_fast:
      return finish_as<Tile, Activation::gelu_fast>(call, sums, row, rows, column, columns);
  }
}

// Tile::run<rows>(…) for a number of rows that is known only now.
template <class Tile, int R, class... Arguments>
void run_tile(int rows, Arguments... arguments) {
  if constexpr (R > 1) {
    if (rows < R) return run_tile<Tile, R - 1>(rows, arguments...);
  }
  Tile::template run<R>(arguments...);
}

constexpr int64_t kAnyDepth = INT32_MAX;  // of a Tile that takes all of K at once
constexpr int64_t kTilesAtOnce = 24;      // whose sums are kept from one part of K to the next

// The weights of a tile's columns, as most tiles read them.
struct TileWeights {
  const uint8_t* b;
  const int32_t* column_sums;  // null where not all of K is read
  const uint8_t* tables;       // of codebook16, of these columns
  int shift;                   // of codebook16: by how many bits the codes of these columns are to be moved
};

inline void prepare(const Gemm& call, const uint8_t* b, int64_t column, bool all_blocks, int64_t, uint8_t*,
                    TileWeights* out) {
  *out = {b, all_blocks ? call.weights.column_sums + column : nullptr, nullptr, 0};
  if (call.weights.kind != Weights::codebook16) return;
  out->tables = call.weights.tables_at(column);
  out->shift = column % kPanelColumns / 16 * 4;
}

// body(panel, prefetch) for the panels [begin, end) of the call's list, while the next one is fetched by `passes` runs
// over a panel's blocks.
template <class Body>
void for_each_panel(const Gemm& call, int64_t begin, int64_t end, int64_t passes, const Body& body) {
  const auto panel = [&](int64_t i) { return call.panels == nullptr ? i : call.panels[i]; };
  for (int64_t i = begin; i < end; ++i) {
    Prefetch prefetch = {call.weights.panels, 0};
    const int64_t next = i + 1 < end ? i + 1 : call.next_panel;
    if (next >= 0) {
      prefetch.next += panel(next) * call.weights.panel_bytes();
      prefetch.lines = static_cast<int>((block_bytes(call.weights.kind) / 64 + passes - 1) / passes);
    }
    body(panel(i), prefetch);
  }
}

// A part of K for all tiles, then the next: ranges of blocks, of which the first goes on from no sums.
struct Parts {
  const Gemm& call;
  int64_t depth, blocks, count;

  // Where half a panel is larger than the first cache holds beside the rows, all tiles pass by a part of it, of `depth`
  // blocks of K, and then by the next: each goes on from its sums, so that these are the same.
  Parts(const Gemm& call, int64_t depth) : call(call), depth(depth), blocks(0), count(1) {
    for (int64_t i = 0; i < call.block_ranges; ++i) blocks += call.blocks[i].end - call.blocks[i].begin;
    if (call.block_ranges == 1 && blocks > depth) count = (blocks + depth - 1) / depth;
  }
  bool all_blocks() const { return blocks == call.weights.blocks; }
  BlockRange part(int64_t p) const {
    const auto begin = static_cast<int32_t>(call.blocks[0].begin + p * depth);
    return {begin, static_cast<int32_t>(smaller(call.blocks[0].end, begin + depth))};
  }
};

// Rows of A, and the number of the first.
struct GemmRows {
  const uint8_t* a;
  int64_t stride;
  int64_t first, count;
};

// All rows by a tile's columns, tile by tile; each is finished while it is in the first cache.
template <class Tile>
void multiply_columns(const Gemm& call, const GemmRows& rows, const typename Tile::Weights& weights, int64_t column,
                      const Parts& parts, Prefetch& prefetch) {
  constexpr int64_t sums_of_tile = Tile::rows * Tile::columns;
  alignas(64) typename Tile::Sum sums[(Tile::depth < kAnyDepth ? kTilesAtOnce : 1) * sums_of_tile];
  const int64_t tiles = (rows.count + Tile::rows - 1) / Tile::rows;
  const auto top = [&](int64_t t) { return rows.count * t / tiles; };  // tiles of nearly equal height
  const int64_t at_once = parts.count > 1 ? kTilesAtOnce : 1;
  for (int64_t first = 0; first < tiles; first += at_once) {
    const int64_t last = smaller(tiles, first + at_once);
    for (int64_t p = 0; p < parts.count; ++p) {
      const BlockRange part = parts.count > 1 ? parts.part(p) : BlockRange();
      for (int64_t t = first; t < last; ++t) {
        run_tile<Tile, Tile::rows>(static_cast<int>(top(t + 1) - top(t)), rows.a + top(t) * rows.stride, rows.stride,
                                   weights, parts.count > 1 ? &part : call.blocks, call.block_ranges, p > 0, prefetch,
                                   sums + (t - first) * sums_of_tile);
        prefetch.next += prefetch.lines * 64 * (parts.count > 1 ? part.end - part.begin : call.weights.blocks);
      }
    }
    for (int64_t t = first; t < last; ++t) {
      finish<Tile>(call, sums + (t - first) * sums_of_tile, rows.first + top(t), top(t + 1) - top(t), column);
    }
  }
}

// Some blocks of a panel of codes as int8 weights, in their places.
inline void expand_panel(const PackedLinear& weights, int64_t panel, const BlockRange* ranges, int64_t range_count,
                         Prefetch& prefetch, uint8_t* out) {
  const uint8_t* const codes = weights.panel(panel);
  const CodeTables tables(weights.tables_at(panel * kPanelColumns));
  for (int64_t r = 0; r < range_count; ++r) {
    for (int64_t k = ranges[r].begin; k < ranges[r].end; ++k) {
      prefetch.some();
      tables.expand(codes + k * block_bytes(Weights::codebook16), out + k * kBlockBytes);
    }
  }
}

// Where a tile finds the weights of a panel: as they are stored,
struct StoredPanels {
  static constexpr int64_t passes = 0;  // over a panel beside those of the tiles
  static const uint8_t* panel(const Gemm& call, int64_t i, Prefetch&, uint8_t*&) { return call.weights.panel(i); }
  static const uint8_t* at(const uint8_t* panel, int64_t column) { return panel + place_in_panel(column); }
};

// as codes, which it looks up itself,
struct CodedPanels : StoredPanels {
  static const uint8_t* at(const uint8_t* panel, int64_t) { return panel; }
};

// or looked up in the scratch, as int8.
struct ExpandedPanels : StoredPanels {
  static constexpr int64_t passes = 1;
  static const uint8_t* panel(const Gemm& call, int64_t i, Prefetch& prefetch, uint8_t*& scratch) {
    scratch += -reinterpret_cast<uintptr_t>(scratch) % 64;
    uint8_t* const out = scratch;
    expand_panel(call.weights, i, call.blocks, call.block_ranges, prefetch, out);
    scratch += call.weights.blocks * kBlockBytes;
    return out;
  }
};

template <class Tile, class Panels = StoredPanels>
void gemm(const Gemm& call, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
          uint8_t* memory) {
  if (row_begin == row_end) return;
  const GemmRows rows = {call.a + row_begin * call.a_stride, call.a_stride, row_begin, row_end - row_begin};
  const Parts parts(call, Tile::depth);
  const int64_t tiles = (rows.count + Tile::rows - 1) / Tile::rows;
  const int64_t passes = tiles * (kPanelColumns / Tile::columns) + Panels::passes;
  for_each_panel(call, panel_begin, panel_end, passes, [&](int64_t panel, Prefetch prefetch) {
    uint8_t* scratch = memory;
    const uint8_t* const b = Panels::panel(call, panel, prefetch, scratch);
    for (int64_t i = 0; i < kPanelColumns; i += Tile::columns) {
      const int64_t column = panel * kPanelColumns + i;
      if (column >= call.weights.columns) return;
      typename Tile::Weights weights;
      prepare(call, Panels::at(b, column), column, parts.all_blocks(), rows.count, scratch, &weights);
      multiply_columns<Tile>(call, rows, weights, column, parts, prefetch);
    }
  });
}

// Of codebook16: few rows read the codes, more of them a panel that is looked up once for all.
template <class Tile, class CodeTile>
void gemm_codes(const Gemm& call, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                uint8_t* scratch) {
  const GemmKernel kernel =
      row_end - row_begin <= CodeTile::few_rows ? gemm<CodeTile, CodedPanels> : gemm<Tile, ExpandedPanels>;
  kernel(call, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace
}  // namespace distilbert_fast
