// Has memory changed that anybody may write? Hashes of all of it, and of samples, a few of which are compared at a
// time.
//
// A region of up to kWhole bytes is in every sample. Of a larger one a sample has every stride-th block, another set of
// them each time, so that `stride` samples have every block, and each shows a change of stride blocks on end. All
// larger regions have one stride, the largest that gives some `blocks` blocks in all, at most kLargestStride, but for
// those of which it would give less than kBlocksOfRegion: a change of a quarter of a region on end, some of its
// rows, shows at once, however small the region is. What a sample costs is the pages that it touches, none of them in
// the caches or the TLB: some 140 ns each, which is why a Look at one asks for them early, and is work that threads do
// while they wait. The hashes of a sample are one sum for several regions: a table of one for each line would be as
// cold as the memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/team.h"
#include "cpu/watch/tree_watch.h"

namespace distilbert_fast {

class Fingerprint {
 public:
  struct Region {
    const uint8_t* data;
    int64_t bytes;
  };
  static constexpr int64_t kBlock = 128, kWhole = 1 << 16, kLargestStride = 16381, kBlocksOfRegion = 4;

  // Throws std::invalid_argument for a null address or a negative size. The regions must outlive it.
  Fingerprint(std::vector<Region> regions, int64_t blocks);

  // Whether the next `count` samples of the memory are what they were. Safe to call from several threads.
  bool matches_samples(int64_t count, int threads);
  // How many samples see all of it.
  int64_t samples() const { return samples_; }
  // Whether all of it is.
  bool matches() const;

 private:
  friend class Look;
  // Of more than kWhole bytes.
  struct Large {
    Region region;
    int64_t stride;  // a prime
    uint64_t sum;    // of all its blocks
  };
  struct Small {
    Region region;
    uint64_t hash;
  };

  // Some samples on end.
  struct Samples {
    uint64_t first;
    int64_t count;
  };
  Samples begin_samples(int64_t count);
  // They are compared in parts, each of some regions.
  int64_t parts() const;
  void ask(int64_t part, const Samples& samples) const;  // for the memory that is read first
  bool part_matches(int64_t part, const Samples& samples) const;

  int64_t parts_of_large() const;
  template <class Body>
  void for_each_block(int64_t part, int64_t sample, const Body& body) const;
  int64_t number_of(const Samples& samples, int64_t i) const;
  uint64_t sum_of(int64_t part, int64_t sample) const;
  bool small_matches(std::size_t i) const;

  int64_t samples_ = 1;
  std::vector<Large> large_;
  std::vector<Small> small_;
  std::vector<uint64_t> sums_;  // [samples, parts_of_large]
  std::atomic<uint64_t> calls_{0};
};

// Whether the next samples of a fingerprint's memory are what they were, told by members of a team while they wait:
// each asks for what its next part reads, and reads it when it waits again. In the last waits the calling thread asks
// for what its next call looks at.
class Look final : public SideWork {
 public:
  // The fingerprint, and the tree, which may be null, must outlive it.
  Look(Fingerprint& memory, int64_t samples, const TreeWatch* tree, int members)
      : memory_(memory),
        samples_(memory.begin_samples(samples)),
        tree_(tree),
        asked_(static_cast<std::size_t>(members)) {}

  bool step(int rank) override;
  void near_end() override { near_end_.store(true, std::memory_order_relaxed); }
  // So far; of all once every member has finished.
  bool holds() const { return holds_.load(std::memory_order_relaxed); }

 private:
  struct alignas(64) Part {
    int64_t number = -1;
  };

  Fingerprint& memory_;
  const Fingerprint::Samples samples_;
  const TreeWatch* tree_;
  std::size_t prefetched_ = 0;  // parts of it, by the calling thread
  std::atomic<bool> near_end_{false};
  std::vector<Part> asked_;  // by each member
  std::atomic<int64_t> next_{0};
  std::atomic<bool> holds_{true};
};

}  // namespace distilbert_fast
