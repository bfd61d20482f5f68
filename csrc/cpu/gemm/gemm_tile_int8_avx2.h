// The products of a few rows of codes with half a panel of int8 weights, by vpmaddubsw.
//
// It multiplies unsigned by signed bytes and adds two such products in 16 bits: 32 products at a time, twice as many as
// vpmaddwd makes of int16, but the sum saturates. The codes come as code + 128, and for each group of four of K and
// sixteen columns one of two forms is exact whatever the codes are:
//
//     plain   where |w0 + w1| ≤ 128 for every pair of neighbours:       (code + 128) · w,          128 w too much
//     signed  for any weights: t = code, or −code − 1 where w < 0:      t · |w| = code · w + min(w, 0)
//
// since 255 · 128, 2 · 128 · 127 and −2 · 128 · 128 are int16. What is too much depends on the weights alone: the sums
// start from it. Of real and of random weights 1 to 2% of the pairs are too large, which makes 15% (K = 3072) to 55%
// (K = 384) of the groups signed; these cost a seventh more. vpmaddwd with ones adds the four products of a group.
//
// Which groups are signed is a bit each. An encoder finds them once; a call without them does as it reads a panel.
#pragma once

#include "cpu/gemm/int8_sums.h"

namespace distilbert_fast {
namespace {

// In assembly, and in this order: left to itself gcc 12 loads the weights again for each row, or spills sums.
inline __attribute__((always_inline)) void add_plain(__m256i& low, __m256i& high, const uint8_t* codes, __m256i w0,
                                                     __m256i w1, __m256i ones) {
  __m256i x, y;
  __asm__ volatile(
      "vpbroadcastd %[group], %[x]\n\t"
      "vpmaddubsw %[w0], %[x], %[y]\n\t"
      "vpmaddubsw %[w1], %[x], %[x]\n\t"
      "vpmaddwd %[ones], %[y], %[y]\n\t"
      "vpmaddwd %[ones], %[x], %[x]\n\t"
      "vpaddd %[y], %[low], %[low]\n\t"
      "vpaddd %[x], %[high], %[high]"
      : [x] "=&x"(x), [y] "=&x"(y), [low] "+x"(low), [high] "+x"(high)
      : [group] "m"(*reinterpret_cast<const uint32_t*>(codes)), [w0] "x"(w0), [w1] "x"(w1), [ones] "x"(ones));
}

inline __attribute__((always_inline)) void add_signed(__m256i& low, __m256i& high, const uint8_t* codes, __m256i size0,
                                                      __m256i size1, __m256i flip0, __m256i flip1, __m256i ones) {
  __m256i x, y;
  __asm__ volatile(
      "vpbroadcastd %[group], %[x]\n\t"
      "vpxor %[flip0], %[x], %[y]\n\t"
      "vpxor %[flip1], %[x], %[x]\n\t"
      "vpmaddubsw %[y], %[size0], %[y]\n\t"
      "vpmaddubsw %[x], %[size1], %[x]\n\t"
      "vpmaddwd %[ones], %[y], %[y]\n\t"
      "vpmaddwd %[ones], %[x], %[x]\n\t"
      "vpaddd %[y], %[low], %[low]\n\t"
      "vpaddd %[x], %[high], %[high]"
      : [x] "=&x"(x), [y] "=&x"(y), [low] "+x"(low), [high] "+x"(high)
      : [group] "m"(*reinterpret_cast<const uint32_t*>(codes)), [size0] "x"(size0), [size1] "x"(size1),
        [flip0] "x"(flip0), [flip1] "x"(flip1), [ones] "x"(ones));
}

inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Which groups of blocks [begin, end) of half a panel are signed, a bit each; adds to what the sums start from.
inline void find_signed(const uint8_t* half, int64_t begin, int64_t end, uint16_t* bits, __m256i (&start)[2]) {
  const __m256i one8 = _mm256_set1_epi8(1), one16 = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
  half += begin * kBlockBytes;
  for (int64_t k = begin; k < end; ++k, half += kBlockBytes) {
    uint32_t of_block = 0;
    for (int g = 0; g < 16; ++g) {
      const __m256i w[2] = {load_bytes(half + g * 64), load_bytes(half + g * 64 + 32)};
      const __m256i pairs[2] = {_mm256_maddubs_epi16(one8, w[0]), _mm256_maddubs_epi16(one8, w[1])};
      const __m256i largest = _mm256_max_epi16(_mm256_abs_epi16(pairs[0]), _mm256_abs_epi16(pairs[1]));
      const __m256i too_large = _mm256_cmpgt_epi16(largest, _mm256_set1_epi16(128));
      const uint32_t is_signed = 1 - static_cast<uint32_t>(_mm256_testz_si256(too_large, too_large));
      of_block |= is_signed << g;
      // Plain: −128 w, else −min(w, 0); by a mask, for a branch would be foretold wrong now and then.
      const __m256i mask = _mm256_set1_epi32(-static_cast<int>(is_signed));
      for (int i = 0; i < 2; ++i) {
        const __m256i plain = _mm256_slli_epi32(_mm256_madd_epi16(one16, pairs[i]), 7);
        const __m256i negative = _mm256_madd_epi16(one16, _mm256_maddubs_epi16(one8, _mm256_min_epi8(w[i], zero)));
        start[i] = _mm256_sub_epi32(start[i], _mm256_blendv_epi8(plain, negative, mask));
      }
    }
    bits[k] = static_cast<uint16_t>(of_block);
  }
}

// For each byte the places of its set bits, in order.
struct BitPlaces {
  uint8_t of[256][8];
  constexpr BitPlaces() : of{} {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0, n = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) of[byte][n++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
constexpr BitPlaces kBitPlaces;

// Half a panel as a tile reads it: plain groups, then signed ones as |w| and as what turns a code into t. Copied once
// for all rows, one group after the other: in the panel every second block is the other half's, so that 12 KiB of a
// half would fill half of the first cache.
struct Int8Weights {
  const uint8_t* groups;      // [plain, 64], then [signed, 128]
  const uint32_t* at;         // where in a row the codes of each group begin
  int64_t plain, with_signs;  // how many
  alignas(32) int32_t start[16];
};

// Where in a row the codes of groups lie: of those in blocks [begin, end) whose bit XOR flip is set. Their number.
inline int64_t list_groups(const uint16_t* bits, uint16_t flip, int64_t begin, int64_t end, uint32_t* out) {
  const uint32_t* const first = out;
  for (int64_t g = begin * 16; g < end * 16; g += 8) {
    const int byte = (bits[g / 16] ^ flip) >> g % 16 & 0xff;
    const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitPlaces.of[byte]));
    const __m256i groups = _mm256_add_epi32(_mm256_cvtepu8_epi32(places), _mm256_set1_epi32(static_cast<int>(g)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_slli_epi32(groups, 2));  // up to 8 too far
    out += __builtin_popcount(static_cast<unsigned>(byte));
  }
  return out - first;
}

inline void prepare(const Gemm& call, const uint8_t* half, int64_t column, bool all_blocks, uint8_t* scratch,
                    Int8Weights* out) {
  const int64_t blocks = call.weights.blocks, groups = blocks * 16;
  scratch += -reinterpret_cast<uintptr_t>(scratch) % 64;  // a group in as few lines as can be
  uint32_t* const at = reinterpret_cast<uint32_t*>(scratch + groups * 128);
  const uint16_t* bits;
  if (all_blocks && call.weights.signed_groups != nullptr) {
    bits = call.weights.signed_groups + column / 16 * blocks;
    __builtin_memcpy(out->start, call.weights.sums_start + column, sizeof out->start);
  } else {
    uint16_t* const found = reinterpret_cast<uint16_t*>(at + groups + 8);
    __m256i start[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t r = 0; r < call.block_ranges; ++r) {
      find_signed(half, call.blocks[r].begin, call.blocks[r].end, found, start);
    }
    __builtin_memcpy(out->start, start, sizeof start);
    bits = found;
  }
  const auto append = [&](uint16_t flip, uint32_t* to) {
    int64_t n = 0;
    for (int64_t r = 0; r < call.block_ranges; ++r) {
      n += list_groups(bits, flip, call.blocks[r].begin, call.blocks[r].end, to + n);
    }
    return n;
  };
  out->plain = append(0xffff, at);
  out->with_signs = append(0, at + out->plain);
  out->at = at;
  out->groups = scratch;
  __m256i* to = reinterpret_cast<__m256i*>(scratch);
  for (int64_t g = 0; g < out->plain + out->with_signs; ++g) {
    const uint8_t* w = half + int64_t{at[g]} * 16 + int64_t{at[g] / 64} * kHalfBytes;
    const __m256i w0 = load_bytes(w), w1 = load_bytes(w + 32);
    if (g < out->plain) {
      _mm256_store_si256(to++, w0);
      _mm256_store_si256(to++, w1);
      continue;
    }
    const __m256i zero = _mm256_setzero_si256(), high_bits = _mm256_set1_epi8(-128);
    _mm256_store_si256(to++, _mm256_abs_epi8(w0));
    _mm256_store_si256(to++, _mm256_abs_epi8(w1));
    _mm256_store_si256(to++, _mm256_xor_si256(high_bits, _mm256_cmpgt_epi8(zero, w0)));
    _mm256_store_si256(to++, _mm256_xor_si256(high_bits, _mm256_cmpgt_epi8(zero, w1)));
  }
}

struct Int8Tile {
  using Sum = int32_t;
  using Vector = __m256i;
  using Weights = Int8Weights;
  static constexpr bool quantized = true;
  static constexpr int rows = 4, columns = 16;
  static constexpr int64_t depth = kAnyDepth;

  // Not inlined: with several heights in one function gcc spills.
  template <int R>
  static __attribute__((noinline)) void run(const uint8_t* a, int64_t stride, const Int8Weights& weights,
                                            const BlockRange*, int64_t, bool, Prefetch prefetch, int32_t* out) {
    const __m256i* const start = reinterpret_cast<const __m256i*>(weights.start);
    const __m256i ones = _mm256_set1_epi16(1);
    Int8Sums<R, Int8Tile> sums;
    sums.start(_mm256_load_si256(start), _mm256_load_si256(start + 1));
    const uint32_t* at = weights.at;
    const uint32_t* const plain_end = at + weights.plain;
    const __m256i* w = reinterpret_cast<const __m256i*>(weights.groups);
    while (at < plain_end) {
      prefetch.some();
      const uint32_t* const stop = plain_end - at < 16 ? plain_end : at + 16;
#pragma GCC unroll 4
      for (; at < stop; ++at, w += 2) {
        __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
        __asm__("" : "+x"(w0), "+x"(w1));
        sums.each_row([&](int r, __m256i& low, __m256i& high)
                          __attribute__((always_inline)) { add_plain(low, high, a + *at + r * stride, w0, w1, ones); });
      }
    }
    const uint32_t* const end = at + weights.with_signs;
    while (at < end) {
      prefetch.some();
      const uint32_t* const stop = end - at < 16 ? end : at + 16;
#pragma GCC unroll 2
      for (; at < stop; ++at, w += 4) {
        __m256i w0 = _mm256_load_si256(w), w1 = _mm256_load_si256(w + 1);
        __m256i flip0 = _mm256_load_si256(w + 2), flip1 = _mm256_load_si256(w + 3);
        __asm__("" : "+x"(w0), "+x"(w1), "+x"(flip0), "+x"(flip1));
        sums.each_row([&](int r, __m256i& low, __m256i& high) __attribute__((always_inline)) {
          add_signed(low, high, a + *at + r * stride, w0, w1, flip0, flip1, ones);
        });
      }
    }
    sums.write(out);
  }
};

// For the halves [begin, end) of all panels: the bits of their groups [blocks], and what the sums of their columns
// start from.
inline void find_signed_groups(const PackedLinear& weights, int64_t begin, int64_t end, uint16_t* bits,
                               int32_t* sums_start) {
  for (int64_t i = begin; i < end; ++i) {
    __m256i start[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    find_signed(weights.panels + i / 2 * weights.panel_bytes() + i % 2 * kHalfBytes, 0, weights.blocks,
                bits + i * weights.blocks, start);
    __builtin_memcpy(sums_start + i * 16, start, sizeof start);
  }
}

}  // namespace
}  // namespace distilbert_fast
