// Exact k-means on a line: see ops/kmeans.py for the contract.
#pragma once

#include <cstdint>

namespace distilbert_fast {

// Each row of x is a problem of its own.
struct KMeans {
  const float* x;        // [rows, columns] contiguous
  const float* weights;  // likewise; null: all 1
  int64_t rows, columns;
  int64_t k;         // 1 to 256
  float* centroids;  // [rows, k], ascending
  uint8_t* codes;    // [rows, columns]
};

// Throws std::invalid_argument before it writes anything if sizes or pointers make no sense, or numbers are not finite.
void kmeans(const KMeans& call, int threads);

}  // namespace distilbert_fast
