// Has memory changed that anybody may write? Hashes of its cache lines, a few of which are compared at a time.
//
// A region of up to kWhole bytes is compared whole every time. Of the larger ones together some `lines` lines are, or
// one in kLargestStride where that is more: every stride-th line, another set of them each time, so that `stride` calls
// see every line, and each sees a change of stride lines on end. What a sample costs is the pages it touches, none of
// them in the caches or the TLB: some 70 ns, which threads share.
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
  static constexpr int64_t kLine = 64, kWhole = 1 << 16, kLargestStride = 2039;

  // Throws std::invalid_argument for a null address or a negative size. The regions must outlive it.
  Fingerprint(std::vector<Region> regions, int64_t lines);

  // Whether the next sample of the memory is what it was. Safe to call from several threads.
  bool matches_sample(int threads);
  // The same in parts that threads share: begin_sample() for a call, then part_matches of each of parts().
  int64_t begin_sample();
  int64_t parts() const;
  bool part_matches(int64_t part, int64_t sample) const;
  // How many samples see all of it.
  int64_t samples() const { return stride_; }
  // Whether all of it is.
  bool matches() const;

 private:
  bool small_matches(std::size_t i) const;
  bool sample_matches(std::size_t begin, std::size_t end, int64_t set) const;
  template <class Test>
  bool all_lines(const Region& region, const Test& test) const;

  int64_t stride_ = 1;  // a prime
  std::vector<Region> small_, large_;
  std::vector<uint32_t> small_hashes_;
  std::vector<std::vector<uint32_t>> large_hashes_;  // of a region, set by set
  std::atomic<uint64_t> calls_{0};
};

}  // namespace distilbert_fast
