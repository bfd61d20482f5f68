// Clusters of a best k-means on a line are intervals of the sorted values. At a price λ for each cluster the best are
//
//     f_j = min_{i < j} f_i + cost(i, j) + λ,      cost(i, j) = Σ w x² − (Σ w x)² / Σ w of the values i to j − 1,
//
// and no other partition into as many clusters is better. The cost is Monge: of two starts i the later one, once it is
// the better, stays so for all later j. So the starts that are best from some j on form a queue, and all f take a
// search for a place in it each. The cost of k clusters is convex in k: a search for λ finds k, or two partitions at
// one λ, with fewer and with more clusters, which are then joined.
//
// Aggarwal, Schieber, Tokuyama, Finding a minimum-weight k-link path in graphs with the concave Monge property, 1994;
// Grønlund, Larsen, Mathiasen, Nielsen, Schneider, Song, Fast exact k-means, k-medians and Bregman divergence
// clustering in 1D, arXiv:1701.07204.
#include "cpu/ops/kmeans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cpu/check.h"
#include "cpu/parallel.h"

namespace distilbert_fast {
namespace {

constexpr const char* kOp = "kmeans";
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A place between two of the sorted values. Sums of those before it, and the cost of their best partition at a price.
struct Cut {
  double weight, sum, squares;
  double best;
};

// At least 0, also where rounding says less or leaves no weight.
double cost(const Cut& begin, const Cut& end) {
  const double weight = end.weight - begin.weight, sum = end.sum - begin.sum;
  return std::max(0.0, end.squares - begin.squares - sum * sum / weight);
}

template <class T>
int32_t size(const std::vector<T>& x) {
  return static_cast<int32_t>(x.size());
}

using Partition = std::vector<int32_t>;  // cuts, the first and the last too

// One problem after the other, in the same memory.
class Solver {
 public:
  void solve(const float* x, const float* weights, int64_t count, int64_t k, float* centroids, uint8_t* codes) {
    sort(x, weights, count);
    const Partition found = clusters(k);
    const int64_t used = write_centroids(found, centroids);
    std::fill(centroids + used, centroids + k, centroids[used - 1]);
    assign(x, count, centroids, used, codes);
  }

 private:
  // The values that have weight, ascending, equal ones as one.
  void sort(const float* x, const float* weights, int64_t count) {
    const bool counted = weights != nullptr && std::any_of(weights, weights + count, [](float w) { return w > 0; });
    keys_.clear();
    keys_.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      const float weight = counted ? weights[i] : 1.0f, value = x[i] + 0.0f;  // not −0
      if (weight == 0) continue;
      uint32_t bits, low;
      std::memcpy(&bits, &value, 4);
      std::memcpy(&low, &weight, 4);
      keys_.push_back(uint64_t{bits >> 31 ? ~bits : bits | 0x80000000u} << 32 | low);
    }
    spare_.resize(keys_.size());
    for (int shift = 32; shift < 64; shift += 8) {
      std::array<size_t, 256> at = {};
      for (const uint64_t key : keys_) ++at[key >> shift & 255];
      size_t sum = 0;
      for (size_t& place : at) sum += std::exchange(place, sum);
      for (const uint64_t key : keys_) spare_[at[key >> shift & 255]++] = key;
      keys_.swap(spare_);
    }
    values_.clear();
    weights_.clear();
    for (const uint64_t key : keys_) {
      const uint32_t ordered = static_cast<uint32_t>(key >> 32), low = static_cast<uint32_t>(key);
      const uint32_t bits = ordered >> 31 ? ordered & 0x7fffffffu : ~ordered;
      float value, weight;
      std::memcpy(&value, &bits, 4);
      std::memcpy(&weight, &low, 4);
      if (values_.empty() || values_.back() != value) {
        values_.push_back(value);
        weights_.push_back(0);
      }
      weights_.back() += weight;
    }
  }

  Partition clusters(int64_t k) {
    const int32_t count = size(values_);
    if (count <= k) {
      Partition all(values_.size() + 1);
      std::iota(all.begin(), all.end(), 0);
      return all;
    }
    if (k == 1) return {0, count};
    double weight = 0, sum = 0;
    for (size_t i = 0; i < values_.size(); ++i) weight += weights_[i], sum += weights_[i] * values_[i];
    const double mean = sum / weight;  // around which sums of squares are smallest
    cuts_.assign(1, {0, 0, 0, 0});
    for (size_t i = 0; i < values_.size(); ++i) {
      const Cut& last = cuts_.back();
      const double w = weights_[i], x = values_[i] - mean;
      cuts_.push_back({last.weight + w, last.sum + w * x, last.squares + w * x * x, 0});
    }
    const double total = cost(cuts_.front(), cuts_.back());
    double price = std::max((price_ == 0 ? 1e-3 : price_) * total, std::numeric_limits<double>::min());
    const int64_t step = count / (128 * k);
    if (step > 3) {  // the price of few cuts first, 128 a cluster
      std::vector<Cut> few;
      for (int64_t i = 0; i < count; i += step) few.push_back(cuts_[i]);
      few.push_back(cuts_.back());
      search(few, k, &price);
      const auto edge = [&](double outside) {  // of the prices for k clusters
        double inside = price;
        for (int i = 0; i < 4; ++i) {
          const double middle = inside * std::sqrt(outside / inside);
          (size(partition(few, middle)) - 1 == k ? inside : outside) = middle;
        }
        return inside;
      };
      const double width = 1 + 3 / static_cast<double>(k);
      price = std::sqrt(edge(price * width)) * std::sqrt(edge(price / width));
    }
    Partition found = search(cuts_, k, &price);
    if (total > 0) price_ = price_ == 0 ? price / total : price_ * std::sqrt(std::sqrt(price / total / price_));
    return found;
  }

  // The best partition into k clusters. price: a first guess, then the one found.
  Partition search(std::vector<Cut>& cuts, int64_t k, double* price) {
    Partition fewer, more;
    double low = 0, high = kInfinity;
    for (int step = 0; low < *price && *price < high; ++step) {
      Partition found = partition(cuts, *price);
      const int32_t count = size(found) - 1;
      if (count == k) return found;
      (count < k ? high : low) = *price;
      (count < k ? fewer : more) = std::move(found);
      const double ratio = static_cast<double>(count) / static_cast<double>(k);
      const double guess = *price * ratio * ratio * ratio;  // the cost goes with 1 / k², its slope with 1 / k³
      *price = step < 8 && low < guess && guess < high ? guess
               : low == 0                              ? high / 64
               : high == kInfinity                     ? low * 64
                                                       : low * std::sqrt(high / low);
    }
    if (more.empty()) return fewer;  // which costs nothing already
    // Where edge t of one lies around edge t + extra of the other, crossing over costs no more than going on.
    const auto extra = static_cast<int32_t>(k) + 1 - size(fewer);
    int32_t t = 0;
    while (more[t + extra + 1] > fewer[t + 1]) ++t;
    Partition joined(more.begin(), more.begin() + t + extra + 1);
    joined.insert(joined.end(), fewer.begin() + t + 1, fewer.end());
    return joined;
  }

  // The best partition at a price for each cluster.
  Partition partition(std::vector<Cut>& all, double price) {
    Cut* const cuts = all.data();
    const int32_t last = size(all) - 1;
    from_.resize(all.size());
    starts_.assign(1, {0, 1});
    for (int32_t j = 1, head = 0;; ++j) {
      while (head + 1 < size(starts_) && starts_[head + 1].from <= j) ++head;
      Cut& cut = cuts[j];
      from_[j] = starts_[head].cut;
      cut.best = cuts[from_[j]].best + cost(cuts[from_[j]], cut) + price;
      if (j == last) break;
      const auto better_for = [&](int32_t end) {  // than the last start of the queue
        const Cut& other = cuts[starts_.back().cut];
        return cut.best + cost(cut, cuts[end]) < other.best + cost(other, cuts[end]);
      };
      const auto from = [&] { return std::max(starts_.back().from, j + 1); };
      while (size(starts_) > head && better_for(from())) starts_.pop_back();
      if (size(starts_) == head) {
        starts_.push_back({j, j + 1});
        continue;
      }
      // The first end for which j is better: in growing steps, then by halves.
      int32_t worse = from(), better = worse;
      for (int32_t step = 1; worse < last; step *= 2) {
        better = step < last - worse ? worse + step : last;
        if (better_for(better)) break;
        worse = better;
      }
      if (worse == last) continue;
      while (better - worse > 1) {
        const int32_t middle = worse + (better - worse) / 2;
        (better_for(middle) ? better : worse) = middle;
      }
      starts_.push_back({j, better});
    }
    Partition found = {last};
    while (found.back() > 0) found.push_back(from_[found.back()]);
    std::reverse(found.begin(), found.end());
    return found;
  }

  // Means of clusters; their number.
  int64_t write_centroids(const Partition& cuts, float* centroids) const {
    int64_t used = 0;
    for (size_t c = 0; c + 1 < cuts.size(); ++c) {
      double weight = 0, sum = 0;
      const double first = values_[cuts[c]];
      for (int32_t i = cuts[c]; i < cuts[c + 1]; ++i) {
        weight += weights_[i];
        sum += weights_[i] * (values_[i] - first);
      }
      const auto mean = static_cast<float>(first + sum / weight);
      if (used == 0 || centroids[used - 1] < mean) centroids[used++] = mean;
    }
    return used;
  }

  // The nearest centroid of each value, the lower of two.
  static void assign(const float* x, int64_t count, const float* centroids, int64_t used, uint8_t* codes) {
    std::array<double, 256> middles;
    middles.fill(kInfinity);
    for (int64_t c = 0; c + 1 < used; ++c) {
      middles[c] = (double{centroids[c]} + double{centroids[c + 1]}) / 2;
    }
    constexpr int64_t kAtOnce = 16;  // searches that do not wait for each other
    for (int64_t i = 0; i < count; i += kAtOnce) {
      const int64_t some = std::min(kAtOnce, count - i);
      size_t found[kAtOnce] = {};
      for (size_t step = 128; step > 0; step /= 2) {
        for (int64_t j = 0; j < some; ++j) found[j] += (middles[found[j] + step - 1] < x[i + j]) * step;
      }
      std::copy_n(found, some, codes + i);
    }
  }

  struct Start {
    int32_t cut, from;  // the best start of clusters that end at `from` or later, up to where the next one is
  };

  std::vector<uint64_t> keys_, spare_;  // an ordered value above the bits of its weight
  std::vector<double> values_, weights_;
  std::vector<Cut> cuts_;
  std::vector<int32_t> from_;  // of each cut: the best start of a cluster that ends there
  std::vector<Start> starts_;
  double price_ = 0;  // of a cluster in the last problems, of the cost of one cluster alone; 0: none yet
};

void check(const KMeans& call) {
  check_sizes(kOp, call.rows, call.columns);
  if (call.k < 1 || call.k > 256) refuse(kOp, "k must be from 1 to 256", std::to_string(call.k));
  if (call.rows == 0) return;
  if (call.columns < 1 || call.columns >= INT32_MAX) {
    refuse(kOp, "x must be of 1 to 2147483646 columns", std::to_string(call.columns));
  }
  check_pointer(kOp, "x", call.x);
  check_pointer(kOp, "centroids", call.centroids);
  check_pointer(kOp, "codes", call.codes);
  for (int64_t i = 0; i < call.rows * call.columns; ++i) {
    if (!std::isfinite(call.x[i])) refuse(kOp, "x must be finite", std::to_string(call.x[i]));
  }
  for (int64_t i = 0; call.weights != nullptr && i < call.rows * call.columns; ++i) {
    if (call.weights[i] >= 0 && std::isfinite(call.weights[i])) continue;
    refuse(kOp, "weights must be finite and not negative", std::to_string(call.weights[i]));
  }
}

}  // namespace

void kmeans(const KMeans& call, int threads) {
  check(call);
  if (call.rows == 0) return;
  threads = std::max(1, usable_threads(threads));
  const int64_t grain = 1 + (1 << 17) / call.columns;  // whatever the threads: one row helps the next
  parallel_rows(call.rows, grain, threads, [&](int64_t begin, int64_t end) {
    Solver solver;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * call.columns;
      solver.solve(call.x + at, call.weights == nullptr ? nullptr : call.weights + at, call.columns, call.k,
                   call.centroids + r * call.k, call.codes + at);
    }
  });
}

}  // namespace distilbert_fast
