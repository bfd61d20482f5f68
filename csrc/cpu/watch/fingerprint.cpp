#include "cpu/watch/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "cpu/check.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

using Region = Fingerprint::Region;
constexpr int64_t kLine = Fingerprint::kLine;
// A prime, so that one set meets all columns of a matrix, however long its rows are.
constexpr int64_t kStrides[] = {Fingerprint::kLargestStride, 1021, 509, 251, 127, 61, 31, 17, 7, 3, 1};
constexpr double kGolden = 0.6180339887;  // of all sets from one sample to the next: neighbours lie far apart
constexpr int64_t kRegionsOfPart = 8;
constexpr int64_t kAhead = 24;  // lines that are on their way from memory

// A change of one word always changes the sum: its factor is odd.
inline uint64_t sum_of_line(const uint8_t* line) {
  constexpr uint64_t kFactors[8] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,
                                    0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3};
  uint64_t sum = 0;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    uint64_t word;
    std::memcpy(&word, line + 8 * i, sizeof word);
    __asm__("" : "+r"(word));  // else vectorized by SSE2, which has no product of 64 bits: a third slower
    sum += word * kFactors[i];
  }
  return sum;
}
inline uint32_t fold(uint64_t sum) { return static_cast<uint32_t>(sum ^ sum >> 32); }

int64_t lines_of(const Region& region) { return (region.bytes + kLine - 1) / kLine; }

uint64_t sum_at(const Region& region, int64_t line) {
  const int64_t begin = line * kLine;
  if (begin + kLine <= region.bytes) return sum_of_line(region.data + begin);
  uint8_t last[kLine] = {};
  std::memcpy(last, region.data + begin, static_cast<size_t>(region.bytes - begin));
  return sum_of_line(last);
}

uint32_t hash_of(const Region& region) {
  uint64_t hash = 0;
  for (int64_t i = 0; i < lines_of(region); ++i) hash = (hash ^ sum_at(region, i)) * 0x9fb21c651e98df25;
  return fold(hash);
}

// Lines to be compared, each kAhead lines after memory was asked for it.
class LinesAhead {
 public:
  struct Line {
    const Region* region;
    int64_t line;
    uint32_t hash;
  };
  // False if the line that leaves the queue for this one has changed.
  bool add(const Line& line) {
    __builtin_prefetch(line.region->data + line.line * kLine);
    Line& place = lines_[added_++ % kAhead];
    const Line oldest = std::exchange(place, line);
    return added_ <= kAhead || matches(oldest);
  }
  // False if one of those that are still in the queue has changed.
  bool finish() const {
    return std::all_of(lines_, lines_ + std::min(added_, kAhead), [](const Line& line) { return matches(line); });
  }

 private:
  static bool matches(const Line& line) { return fold(sum_at(*line.region, line.line)) == line.hash; }

  Line lines_[kAhead];
  int64_t added_ = 0;
};

// Lines set, set + stride, … of n: how many, and how many are in the sets before.
int64_t count_of(int64_t n, int64_t stride, int64_t set) { return n / stride + (set < n % stride ? 1 : 0); }
int64_t count_before(int64_t n, int64_t stride, int64_t set) { return n / stride * set + std::min(set, n % stride); }

}  // namespace

// test(line, its place among the hashes) of every line, until one is false.
template <class Test>
bool Fingerprint::all_lines(const Region& region, const Test& test) const {
  const int64_t n = lines_of(region), quotient = n / stride_, rest = n % stride_;
  for (int64_t first = 0, row = 0; first < n; first += stride_, ++row) {
    const int64_t sets = std::min(stride_, n - first);
    for (int64_t set = 0; set < sets; ++set) {
      if (!test(first + set, static_cast<size_t>(quotient * set + std::min(set, rest) + row))) return false;
    }
  }
  return true;
}

Fingerprint::Fingerprint(std::vector<Region> regions, int64_t lines) {
  int64_t all = 0;
  for (const Region& region : regions) {
    if (region.bytes < 0) refuse("Fingerprint", "bytes must be 0 or more", std::to_string(region.bytes));
    if (region.bytes > 0 && region.data == nullptr) refuse("Fingerprint", "data must point to memory", "null");
    const bool small = region.bytes <= kWhole;
    (small ? small_ : large_).push_back(region);
    all += small ? 0 : lines_of(region);
  }
  for (const int64_t stride : kStrides) {
    stride_ = stride;
    if (all / stride >= lines) break;
  }
  for (const Region& region : small_) small_hashes_.push_back(hash_of(region));
  for (const Region& region : large_) {
    std::vector<uint32_t> hashes(static_cast<size_t>(lines_of(region)));
    all_lines(region, [&](int64_t line, size_t at) {
      hashes[at] = fold(sum_at(region, line));
      return true;
    });
    large_hashes_.push_back(std::move(hashes));
  }
}

bool Fingerprint::small_matches(size_t i) const {
  if (i + 1 < small_.size()) {
    const Region& next = small_[i + 1];
    for (int64_t line = 0; line < std::min(lines_of(next), kAhead); ++line)
      __builtin_prefetch(next.data + line * kLine);
  }
  return hash_of(small_[i]) == small_hashes_[i];
}

bool Fingerprint::sample_matches(size_t begin, size_t end, int64_t set) const {
  LinesAhead ahead;
  for (size_t i = begin; i < end; ++i) {
    const Region& region = large_[i];
    const int64_t n = lines_of(region), count = count_of(n, stride_, set);
    const uint32_t* wanted = large_hashes_[i].data() + count_before(n, stride_, set);
    for (int64_t k = 0; k < count; ++k) {
      if (!ahead.add({&region, set + k * stride_, wanted[k]})) return false;
    }
  }
  return ahead.finish();
}

int64_t Fingerprint::begin_sample() {
  const uint64_t call = calls_.fetch_add(1, std::memory_order_relaxed);
  const auto step = static_cast<uint64_t>(static_cast<double>(stride_) * kGolden) | 1;
  return static_cast<int64_t>(call * step % static_cast<uint64_t>(stride_));
}

int64_t Fingerprint::parts() const {
  return (static_cast<int64_t>(large_.size() + small_.size()) + kRegionsOfPart - 1) / kRegionsOfPart;
}

bool Fingerprint::part_matches(int64_t part, int64_t sample) const {
  const size_t begin = static_cast<size_t>(part * kRegionsOfPart);
  const size_t end = std::min(begin + kRegionsOfPart, large_.size() + small_.size());
  const size_t split = std::clamp(large_.size(), begin, end);
  bool matches = sample_matches(begin, split, sample);
  for (size_t i = split; i < end && matches; ++i) matches = small_matches(i - large_.size());
  return matches;
}

bool Fingerprint::matches_sample(int threads) {
  const int64_t sample = begin_sample();
  std::atomic<bool> same{true};
  parallel_rows(parts(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
      if (!part_matches(i, sample)) same.store(false, std::memory_order_relaxed);
    }
  });
  return same.load(std::memory_order_relaxed);
}

bool Fingerprint::matches() const {
  for (size_t i = 0; i < large_.size(); ++i) {
    const Region& region = large_[i];
    const auto same = [&](int64_t line, size_t at) { return fold(sum_at(region, line)) == large_hashes_[i][at]; };
    if (!all_lines(region, same)) return false;
  }
  for (size_t i = 0; i < small_.size(); ++i) {
    if (!small_matches(i)) return false;
  }
  return true;
}

}  // namespace distilbert_fast
