// Has memory changed that anybody may write? Hashes of all of it, and of samples, a few of which are compared at a
// time.
//
// A region of up to kWhole bytes is in every sample. Of a larger one a sample has every stride-th block, another set of
// them each time, so that `stride` samples have every block, and each shows a change of stride blocks on end. All
// larger regions have one stride, the largest that gives some `blocks` blocks in all, at most kLargestStride, but for
// those of which it would give less than kBlocksOfRegion: a change of a quarter of a region shows at once, however
// small it is. What a sample costs is the pages that it touches, none of them in the caches or the TLB: some 140 ns
// each, which threads share. The hashes of a sample are one sum for several regions: a table of one for each line would
// be as cold as the memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

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

  // Some samples on end.
  struct Samples {
    uint64_t first;
    int64_t count;
  };

  // Whether the next `count` samples of the memory are what they were. Safe to call from several threads.
  bool matches_samples(int64_t count, int threads);
  // The same in parts that threads share: begin_samples() for a call, then part_matches of each of parts().
  Samples begin_samples(int64_t count);
  int64_t parts() const;
  bool part_matches(int64_t part, const Samples& samples) const;
  // How many samples see all of it.
  int64_t samples() const { return samples_; }
  // Whether all of it is.
  bool matches() const;

 private:
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

  int64_t parts_of_large() const;
  uint64_t sum_of(int64_t part, int64_t sample) const;
  bool small_matches(std::size_t i) const;

  int64_t samples_ = 1;
  std::vector<Large> large_;
  std::vector<Small> small_;
  std::vector<uint64_t> sums_;  // [samples, parts_of_large]
  std::atomic<uint64_t> calls_{0};
};

}  // namespace distilbert_fast
