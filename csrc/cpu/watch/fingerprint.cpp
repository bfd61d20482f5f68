#include "cpu/watch/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

#include "cpu/check.h"
#include "cpu/threads.h"

namespace distilbert_fast {
namespace {

using Region = Fingerprint::Region;
constexpr int64_t kLine = 64, kBlock = Fingerprint::kBlock;
// A prime, so that one set meets all columns of a matrix, however long its rows are.
constexpr int64_t kStrides[] = {
    Fingerprint::kLargestStride, 8191, 4093, 2039, 1021, 509, 251, 127, 61, 31, 17, 7, 3, 1};
constexpr double kGolden = 0.6180339887;  // of all sets from one sample to the next: neighbours lie far apart
constexpr int64_t kRegionsOfPart = 4;
constexpr int64_t kAhead = 24;  // blocks that are on their way from memory

// Both halves of a product, one over the other. The lower half alone carries no bit downwards: of two words whose
// highest bits, the signs of floats, change, the changes would cancel.
inline uint64_t folded_product(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// As wyhash mixes: two words in a product, each with a key that makes it hardly ever 0.
inline uint64_t sum_of_line(const uint8_t* line) {
  constexpr uint64_t kKeys[8] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,
                                 0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3};
  uint64_t words[8], sum = 0;
  std::memcpy(words, line, sizeof words);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) sum += folded_product(words[i] ^ kKeys[i], words[i + 1] ^ kKeys[i + 1]);
  return sum;
}
int64_t blocks_of(const Region& region) { return (region.bytes + kBlock - 1) / kBlock; }

// Of bytes in order, zeros after the end.
uint64_t hash_of(const uint8_t* data, int64_t bytes) {
  uint64_t hash = 0;
  const auto add = [&](const uint8_t* line) { hash = folded_product(hash ^ sum_of_line(line), 0x9fb21c651e98df25); };
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) add(data + i);
  if (i < bytes) {
    uint8_t last[kLine] = {};
    std::memcpy(last, data + i, static_cast<size_t>(bytes - i));
    add(last);
  }
  return hash;
}

uint64_t hash_of(const Region& region) { return hash_of(region.data, region.bytes); }

// Of a block, to be added to those of others; where it lies counts.
uint64_t term_of(const Region& region, int64_t block) {
  const int64_t begin = block * kBlock;
  return hash_of(region.data + begin, std::min(kBlock, region.bytes - begin)) * static_cast<uint64_t>(2 * block + 1);
}

uint64_t sum_of_all(const Region& region) {
  uint64_t sum = 0;
  for (int64_t block = 0; block < blocks_of(region); ++block) sum += term_of(region, block);
  return sum;
}

void prefetch(const uint8_t* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(data + i);
}
void prefetch_block(const Region& region, int64_t block) {
  prefetch(region.data + block * kBlock, std::min(kBlock, region.bytes - block * kBlock));
}
void prefetch_small(const Region& region) { prefetch(region.data, std::min(region.bytes, kAhead * kLine)); }

// The largest stride, up to a limit, of which so many blocks of n are multiples.
int64_t stride_for(int64_t n, int64_t blocks, int64_t limit) {
  return *std::find_if(std::begin(kStrides), std::end(kStrides) - 1,
                       [&](int64_t stride) { return stride <= limit && n / stride >= blocks; });
}

// Which set of blocks a sample is.
int64_t set_of(int64_t sample, int64_t stride) {
  const auto step = static_cast<int64_t>(static_cast<double>(stride) * kGolden) | 1;
  return sample * step % stride;
}

}  // namespace

Fingerprint::Fingerprint(std::vector<Region> regions, int64_t blocks) {
  int64_t all = 0;
  for (const Region& region : regions) {
    if (region.bytes < 0) refuse("Fingerprint", "bytes must be 0 or more", std::to_string(region.bytes));
    if (region.bytes > 0 && region.data == nullptr) refuse("Fingerprint", "data must point to memory", "null");
    if (region.bytes <= kWhole) {
      small_.push_back({region, hash_of(region)});
    } else {
      large_.push_back({region, 1, 0});
      all += blocks_of(region);
    }
  }
  // The largest first: threads that share them end together.
  std::stable_sort(large_.begin(), large_.end(),
                   [](const Large& a, const Large& b) { return a.region.bytes > b.region.bytes; });
  const int64_t shared = stride_for(all, blocks, kLargestStride);
  for (Large& large : large_) {
    large.stride = stride_for(blocks_of(large.region), kBlocksOfRegion, shared);
    samples_ = std::max(samples_, large.stride);
  }
  sums_.resize(static_cast<size_t>(samples_ * parts_of_large()));
  for (size_t i = 0; i < large_.size(); ++i) {
    auto& [region, stride, sum] = large_[i];
    std::vector<uint64_t> sums(static_cast<size_t>(stride));  // set by set
    for (int64_t block = 0; block < blocks_of(region); ++block) {
      sums[static_cast<size_t>(block % stride)] += term_of(region, block);
    }
    sum = std::accumulate(sums.begin(), sums.end(), uint64_t{0});
    uint64_t* out = sums_.data() + i / kRegionsOfPart;
    for (int64_t sample = 0; sample < samples_; ++sample, out += parts_of_large()) {
      *out += sums[static_cast<size_t>(set_of(sample, stride))];
    }
  }
}

int64_t Fingerprint::parts_of_large() const {
  return (static_cast<int64_t>(large_.size()) + kRegionsOfPart - 1) / kRegionsOfPart;
}

int64_t Fingerprint::parts() const {
  return parts_of_large() + (static_cast<int64_t>(small_.size()) + kRegionsOfPart - 1) / kRegionsOfPart;
}

int64_t Fingerprint::number_of(const Samples& samples, int64_t i) const {
  return static_cast<int64_t>((samples.first + static_cast<uint64_t>(i)) % static_cast<uint64_t>(samples_));
}

// body(region, block) for each that a sample has of a part.
template <class Body>
void Fingerprint::for_each_block(int64_t part, int64_t sample, const Body& body) const {
  const auto begin = static_cast<size_t>(part * kRegionsOfPart);
  for (size_t i = begin; i < std::min(begin + kRegionsOfPart, large_.size()); ++i) {
    const auto& [region, stride, all] = large_[i];
    for (int64_t block = set_of(sample, stride); block < blocks_of(region); block += stride) body(region, block);
  }
}

// Each block kAhead blocks after memory was asked for it.
uint64_t Fingerprint::sum_of(int64_t part, int64_t sample) const {
  struct Place {
    const Region* region;
    int64_t block;
  } places[kAhead];
  uint64_t sum = 0;
  int64_t added = 0;
  for_each_block(part, sample, [&](const Region& region, int64_t block) {
    prefetch_block(region, block);
    Place& place = places[added % kAhead];
    if (added++ >= kAhead) sum += term_of(*place.region, place.block);
    place = {&region, block};
  });
  for (int64_t i = 0; i < std::min(added, kAhead); ++i) sum += term_of(*places[i].region, places[i].block);
  return sum;
}

bool Fingerprint::small_matches(size_t i) const {
  if (i + 1 < small_.size()) prefetch_small(small_[i + 1].region);
  return hash_of(small_[i].region) == small_[i].hash;
}

Fingerprint::Samples Fingerprint::begin_samples(int64_t count) {
  count = std::clamp<int64_t>(count, 1, samples_);
  return {calls_.fetch_add(static_cast<uint64_t>(count), std::memory_order_relaxed), count};
}

void Fingerprint::ask(int64_t part, const Samples& samples) const {
  if (part < parts_of_large()) {
    for_each_block(part, number_of(samples, 0), prefetch_block);
  } else {
    prefetch_small(small_[static_cast<size_t>((part - parts_of_large()) * kRegionsOfPart)].region);
  }
}

bool Fingerprint::part_matches(int64_t part, const Samples& samples) const {
  if (part < parts_of_large()) {
    for (int64_t i = 0; i < samples.count; ++i) {
      const int64_t sample = number_of(samples, i);
      if (sum_of(part, sample) != sums_[static_cast<size_t>(sample * parts_of_large() + part)]) return false;
    }
    return true;
  }
  const auto begin = static_cast<size_t>((part - parts_of_large()) * kRegionsOfPart);
  for (size_t i = begin; i < std::min(begin + kRegionsOfPart, small_.size()); ++i) {
    if (!small_matches(i)) return false;
  }
  return true;
}

bool Look::step(int rank) {
  int64_t& part = asked_[static_cast<size_t>(rank)].number;
  if (part >= 0 && !memory_.part_matches(part, samples_)) holds_.store(false, std::memory_order_relaxed);
  const bool left = holds() && next_.load(std::memory_order_relaxed) < memory_.parts();
  part = left ? next_.fetch_add(1, std::memory_order_relaxed) : -1;
  if (part >= memory_.parts()) part = -1;  // another member has just taken the last
  if (part >= 0) {
    memory_.ask(part, samples_);
  } else if (rank == 0 && tree_ != nullptr && near_end_.load(std::memory_order_relaxed) &&
             prefetched_ < TreeWatch::kParts) {
    tree_->prefetch(prefetched_++);
  }
  return part >= 0;
}

bool Fingerprint::matches_samples(int64_t count, int threads) {
  threads = std::max(usable_threads(threads), 1);
  Look look(*this, count, nullptr, threads);
  run_team(threads, [&](int rank, int) { look.finish(rank); });
  return look.holds();
}

bool Fingerprint::matches() const {
  for (const Large& large : large_) {
    if (sum_of_all(large.region) != large.sum) return false;
  }
  for (size_t i = 0; i < small_.size(); ++i) {
    if (!small_matches(i)) return false;
  }
  return true;
}

}  // namespace distilbert_fast
