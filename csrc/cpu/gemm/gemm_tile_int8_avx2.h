// The products of a few rows of codes with eight columns of int8 weights, by vpmaddubsw.
//
// It multiplies unsigned by signed bytes and adds two such products in 16 bits: 32 products at a time, twice as many as
// vpmaddwd makes of int16, but the sum saturates. The codes come as x = code + 128, and a weight may be read with
// either sign: (code + 128) · w is 128 w too much, and (255 − x) · −w = code · w − 127 w. What is too much depends on
// the weights alone: the sums start from it. So two sums of two products may be added in 16 bits before vpmaddwd with
// ones adds neighbours in 32, if, with signs chosen well, neither the positive ones of their four weights nor the
// negative ones exceed 128 together, for 255 · 128 is int16:
//
//     matched   two groups of four of K and eight columns: the weights of the second have signs of our choice
//     single    any group: t = code, or −code − 1 where w < 0, and t · |w| = code · w + min(w, 0)
//
// which is int16 too, since −2 · 128 · 128 is. For each row a match is 6 instructions, of which 3 multiply, a single
// group 4, of which 2 do.
//
// Any two groups may be matched. Of real and of random weights almost all can be, each with one of the last few that
// found none yet. An encoder matches them once; a call without matches does so for many rows only.
#pragma once

namespace distilbert_fast {
namespace {

// In assembly, and in this order: left to itself gcc 12 loads the weights again for each row, or spills sums.
inline __attribute__((always_inline)) void add_match(__m256i& sum, const uint8_t* codes0, const uint8_t* codes1,
                                                     __m256i w0, __m256i w1, __m256i flip1, __m256i ones) {
  __m256i x, y;
  __asm__ volatile(
      "vpbroadcastd %[group1], %[y]\n\t"
      "vpbroadcastd %[group0], %[x]\n\t"
      "vpxor %[flip1], %[y], %[y]\n\t"
      "vpmaddubsw %[w0], %[x], %[x]\n\t"
      "vpmaddubsw %[w1], %[y], %[y]\n\t"
      "vpaddw %[y], %[x], %[x]\n\t"
      "vpmaddwd %[ones], %[x], %[x]\n\t"
      "vpaddd %[x], %[sum], %[sum]"
      : [x] "=&x"(x), [y] "=&x"(y), [sum] "+x"(sum)
      : [group0] "m"(*reinterpret_cast<const uint32_t*>(codes0)),
        [group1] "m"(*reinterpret_cast<const uint32_t*>(codes1)), [w0] "x"(w0), [w1] "x"(w1), [flip1] "x"(flip1),
        [ones] "x"(ones));
}

inline __attribute__((always_inline)) void add_single(__m256i& sum, const uint8_t* codes, __m256i size, __m256i flip,
                                                      __m256i ones) {
  __m256i x;
  __asm__ volatile(
      "vpbroadcastd %[group], %[x]\n\t"
      "vpxor %[flip], %[x], %[x]\n\t"
      "vpmaddubsw %[x], %[size], %[x]\n\t"
      "vpmaddwd %[ones], %[x], %[x]\n\t"
      "vpaddd %[x], %[sum], %[sum]"
      : [x] "=&x"(x), [sum] "+x"(sum)
      : [group] "m"(*reinterpret_cast<const uint32_t*>(codes)), [size] "x"(size), [flip] "x"(flip), [ones] "x"(ones));
}

inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// The weights of a group, counted in groups along K, of eight columns that begin at `strip`.
inline __m256i group_at(const uint8_t* strip, int64_t group) {
  return load_bytes(strip + group * 64 + group / 16 * kHalfBytes);
}

// What matching asks of a group; but for the weights, of each pair of neighbours, in 16 bits.
struct Group {
  __m256i weights;
  __m256i less, more;       // the sum of the positive weights and that of the magnitudes of the others
  __m256i smaller, larger;  // the two magnitudes
  uint16_t place;           // along K

  Group() = default;
  Group(__m256i w, uint16_t place) : weights(w), place(place) {
    const __m256i one = _mm256_set1_epi8(1), size = _mm256_abs_epi8(w);
    const __m256i positive = _mm256_max_epi8(w, _mm256_setzero_si256()), negative = _mm256_sub_epi8(size, positive);
    const __m256i sums[2] = {_mm256_maddubs_epi16(positive, one), _mm256_maddubs_epi16(negative, one)};
    const __m256i first = _mm256_and_si256(size, _mm256_set1_epi16(0xff)), second = _mm256_srli_epi16(size, 8);
    less = _mm256_min_epi16(sums[0], sums[1]);
    more = _mm256_max_epi16(sums[0], sums[1]);
    smaller = _mm256_min_epi16(first, second);
    larger = _mm256_max_epi16(first, second);
  }
};

// Whether the signs of `turned` can be chosen so that all fits. The larger weight of a pair goes to the side that holds
// less, then the smaller one likewise: if that is too much, so is every other choice.
inline bool fits(const Group& fixed, const Group& turned) {
  const __m256i first = _mm256_add_epi16(fixed.less, turned.larger);
  const __m256i second = _mm256_add_epi16(_mm256_min_epi16(first, fixed.more), turned.smaller);
  const __m256i most = _mm256_max_epi16(fixed.more, _mm256_max_epi16(first, second));
  const __m256i too_much = _mm256_cmpgt_epi16(most, _mm256_set1_epi16(128));
  return _mm256_testz_si256(too_much, too_much) != 0;
}

inline __m256i pair_sums(__m256i w) { return _mm256_maddubs_epi16(_mm256_set1_epi8(1), w); }

// The bytes of `turned` whose signs change by that choice.
inline __m256i flips_of(const Group& fixed, const Group& turned) {
  const __m256i zero = _mm256_setzero_si256(), low = _mm256_set1_epi16(0xff);
  const __m256i to_negative = _mm256_cmpgt_epi16(pair_sums(fixed.weights), zero);  // where the larger one goes
  const __m256i apart = _mm256_cmpgt_epi16(_mm256_add_epi16(fixed.less, turned.larger), fixed.more);
  const __m256i size = _mm256_abs_epi8(turned.weights);
  const __m256i second_is_larger = _mm256_cmpgt_epi16(_mm256_srli_epi16(size, 8), _mm256_and_si256(size, low));
  const __m256i is_larger = _mm256_xor_si256(second_is_larger, low);  // of bytes
  const __m256i wanted = _mm256_xor_si256(to_negative, _mm256_andnot_si256(is_larger, apart));
  return _mm256_xor_si256(wanted, _mm256_cmpgt_epi8(zero, turned.weights));
}

// The memory of match_words(blocks) words.
struct Matches {
  int32_t* start;    // [8] what the sums of the columns start from
  uint32_t* count;   // [1]
  uint32_t* flips;   // [count] of the second group of each match, a bit for each of its bytes
  uint16_t* groups;  // [2 · count] two for each match, then the single ones

  Matches(uint32_t* memory, int64_t blocks)
      : start(reinterpret_cast<int32_t*>(memory)),
        count(memory + 8),
        flips(memory + 9),
        groups(reinterpret_cast<uint16_t*>(memory + 9 + 8 * blocks)) {}
};

// −128 w of all groups, and what is too much of others instead.
class Start {
 public:
  // factor · the sum of w by column
  void add(__m256i w, int16_t factor) {
    sums_ = _mm256_add_epi32(sums_, _mm256_madd_epi16(pair_sums(w), _mm256_set1_epi16(factor)));
  }
  // −min(w, 0)
  void add_single(__m256i w) { add(_mm256_min_epi8(w, _mm256_setzero_si256()), -1); }
  void store(int32_t* out) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sums_); }

 private:
  __m256i sums_ = _mm256_setzero_si256();
};

// Of groups of K, in order, some blocks' at a time.
template <class Body>
inline void for_each_group(const BlockRange* ranges, int64_t range_count, const Body& body) {
  for (int64_t r = 0; r < range_count; ++r) {
    for (int64_t g = int64_t{ranges[r].begin} * 16; g < int64_t{ranges[r].end} * 16; ++g) {
      body(static_cast<uint16_t>(g));
    }
  }
}

// No matches: all groups of some blocks single.
inline void leave_single(const uint8_t* strip, const BlockRange* ranges, int64_t range_count, Matches out) {
  Start start;
  uint16_t* single = out.groups;
  for_each_group(ranges, range_count, [&](uint16_t group) {
    *single++ = group;
    start.add_single(group_at(strip, group));
  });
  *out.count = 0;
  start.store(out.start);
}

// Matches each group of some blocks, `groups` in all, with the first that fits of those that wait for one.
inline void match(const uint8_t* strip, const BlockRange* ranges, int64_t range_count, int64_t groups, Matches out) {
  constexpr uint32_t kWaiting = 8;
  Group waiting[kWaiting];
  uint32_t waits = 0, count = 0;
  uint16_t* single = out.groups + groups;  // from the end
  Start start;
  const auto leave_single = [&](const Group& group) {
    *--single = group.place;
    start.add(group.weights, 128);
    start.add_single(group.weights);
  };
  for_each_group(ranges, range_count, [&](uint16_t place) {
    const Group group(group_at(strip, place), place);
    start.add(group.weights, -128);
    // −128 has no other sign.
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi8(group.weights, _mm256_set1_epi8(-128))) != 0) return leave_single(group);
    for (uint32_t i = 0; i < waits; ++i) {
      const bool turn = fits(waiting[i], group);  // else the one that waited
      if (!(turn | fits(group, waiting[i]))) continue;
      const Group &fixed = turn ? waiting[i] : group, &turned = turn ? group : waiting[i];
      const __m256i flips = flips_of(fixed, turned);
      out.flips[count] = static_cast<uint32_t>(_mm256_movemask_epi8(flips));
      out.groups[2 * count] = fixed.place;
      out.groups[2 * count++ + 1] = turned.place;
      start.add(_mm256_and_si256(flips, turned.weights), 255);  // 127 w
      waiting[i] = waiting[--waits];
      return;
    }
    if (waits < kWaiting) {
      waiting[waits++] = group;
    } else {
      leave_single(waiting[place % kWaiting]);
      waiting[place % kWaiting] = group;
    }
  });
  while (waits > 0) leave_single(waiting[--waits]);
  *out.count = count;
  start.store(out.start);
}

// What a tile reads of a match, and of a single group.
struct Match {
  __m256i w0, w1, flip1;
};
struct Single {
  __m256i size, flip;
};

inline Match read_match(const uint8_t* strip, const uint16_t* groups, uint32_t flips) {
  // Byte i of the mask is bit i % 8 of byte i / 8.
  const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(flips)), bytes);
  const __m256i flip1 = _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), bit);
  const __m256i w1 = _mm256_sub_epi8(_mm256_xor_si256(group_at(strip, groups[1]), flip1), flip1);
  return {group_at(strip, groups[0]), w1, flip1};
}

inline Single read_single(const uint8_t* strip, uint16_t group) {
  const __m256i w = group_at(strip, group), negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), w);
  return {_mm256_abs_epi8(w), _mm256_xor_si256(_mm256_set1_epi8(-128), negative)};
}

// Eight columns, and which of their groups of K are read, as what. Where several tiles of rows do so, as a copy.
struct Int8Weights {
  const uint8_t* strip;
  const uint32_t* flips;
  const uint16_t* groups;
  int64_t matches, singles;
  const int32_t* start;
  const Match* copied_matches;  // null: not copied
  const Single* copied_singles;
};

constexpr int64_t kRowsWorthMatching = 96;
constexpr int64_t kRowsWorthCopying = 17;

inline void prepare(const Gemm& call, const uint8_t* strip, int64_t column, bool all_blocks, int64_t rows,
                    uint8_t* scratch, Int8Weights* out) {
  const int64_t blocks = call.weights.blocks;
  scratch += -reinterpret_cast<uintptr_t>(scratch) % 64;
  int64_t groups = 0;
  for (int64_t r = 0; r < call.block_ranges; ++r) groups += 16 * (call.blocks[r].end - call.blocks[r].begin);
  uint32_t* memory = reinterpret_cast<uint32_t*>(scratch + 64 * groups);
  if (all_blocks && call.weights.matches != nullptr) {
    memory = const_cast<uint32_t*>(call.weights.matches) + column / 8 * match_words(blocks);
  } else if (rows < kRowsWorthMatching) {
    leave_single(strip, call.blocks, call.block_ranges, Matches(memory, blocks));
  } else {
    match(strip, call.blocks, call.block_ranges, groups, Matches(memory, blocks));
  }
  const Matches found(memory, blocks);
  const int64_t count = *found.count;
  *out = {strip, found.flips, found.groups, count, groups - 2 * count, found.start, nullptr, nullptr};
  if (rows < kRowsWorthCopying) return;
  Match* const matches = reinterpret_cast<Match*>(scratch);
  for (int64_t i = 0; i < count; ++i) matches[i] = read_match(strip, out->groups + 2 * i, out->flips[i]);
  Single* const singles = reinterpret_cast<Single*>(matches + count);
  for (int64_t i = 0; i < out->singles; ++i) singles[i] = read_single(strip, out->groups[2 * count + i]);
  out->copied_matches = matches;
  out->copied_singles = singles;
}

struct Int8Tile {
  using Sum = int32_t;
  using Weights = Int8Weights;
  static constexpr bool quantized = true;
  static constexpr int rows = 8, columns = 8;
  static constexpr int64_t depth = kAnyDepth;

  template <int R>
  static void run(const uint8_t* a, int64_t stride, const Int8Weights& weights, const BlockRange*, int64_t, bool,
                  Prefetch prefetch, int32_t* out) {
    if (weights.copied_matches != nullptr) {
      multiply<R>(
          a, stride, weights, [&](int64_t i) { return weights.copied_matches[i]; },
          [&](int64_t i) { return weights.copied_singles[i]; }, prefetch, out);
    } else {
      multiply<R>(
          a, stride, weights,
          [&](int64_t i) { return read_match(weights.strip, weights.groups + 2 * i, weights.flips[i]); },
          [&](int64_t i) { return read_single(weights.strip, weights.groups[2 * weights.matches + i]); }, prefetch,
          out);
    }
  }

  // Not inlined: with several heights in one function gcc spills.
  template <int R, class ReadMatch, class ReadSingle>
  static __attribute__((noinline)) void multiply(const uint8_t* a, int64_t stride, const Int8Weights& weights,
                                                 const ReadMatch& read_match, const ReadSingle& read_single,
                                                 Prefetch prefetch, int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[R];
    const uint8_t* rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sums[r] = load_bytes(reinterpret_cast<const uint8_t*>(weights.start));
      rows[r] = a + r * stride;
      __asm__("" : "+r"(rows[r]));
    }
    const uint16_t* group = weights.groups;
    for (int64_t i = 0; i < weights.matches;) {
      prefetch.some();
#pragma GCC unroll 2
      for (const int64_t stop = smaller(weights.matches, i + 8); i < stop; ++i, group += 2) {
        Match m = read_match(i);
        __asm__("" : "+x"(m.w0), "+x"(m.w1), "+x"(m.flip1));
        const int64_t at0 = group[0], at1 = group[1];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) add_match(sums[r], rows[r] + 4 * at0, rows[r] + 4 * at1, m.w0, m.w1, m.flip1, ones);
      }
    }
    for (int64_t i = 0; i < weights.singles;) {
      prefetch.some();
      for (const int64_t stop = smaller(weights.singles, i + 16); i < stop; ++i, ++group) {
        Single s = read_single(i);
        __asm__("" : "+x"(s.size), "+x"(s.flip));
        const int64_t at = *group;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) add_single(sums[r], rows[r] + 4 * at, s.size, s.flip, ones);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) _mm256_store_si256(reinterpret_cast<__m256i*>(out) + r, sums[r]);
  }
};

// For the strips [begin, end) of eight columns of all panels.
inline void match_groups(const PackedLinear& weights, int64_t begin, int64_t end, uint8_t* scratch, uint32_t* out) {
  const BlockRange all = {0, static_cast<int32_t>(weights.blocks)};
  scratch += -reinterpret_cast<uintptr_t>(scratch) % 64;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t panel = i * 8 / kPanelColumns;
    const uint8_t* b = weights.panel(panel);
    if (weights.kind == Weights::codebook16) {
      Prefetch none = {b, 0};
      if (i == begin || i * 8 % kPanelColumns == 0) expand_panel(weights, panel, &all, 1, none, scratch);
      b = scratch;
    }
    match(b + place_in_panel(i * 8), &all, 1, weights.blocks * 16,
          Matches(out + i * match_words(weights.blocks), weights.blocks));
  }
}

}  // namespace
}  // namespace distilbert_fast
