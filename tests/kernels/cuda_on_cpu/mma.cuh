// csrc/cuda/mma.cuh on the CPU: the same functions with the same fragments, exchanged between the lanes of a warp.
// An asynchronous copy spoils its destination at once and lands when its thread waits for it, so that neither a missing
// wait nor a buffer that is filled too early can pass. ldmatrix counts the bank conflicts that it would meet.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

namespace distilbert_fast {

inline unsigned char* shared_memory() { return emulated::shared.data; }

// The row addresses of a warp's lanes, checked: each in shared memory on a 16-byte boundary.
inline emulated::OfWarp<const unsigned char*> matrix_rows(const void* row) {
  const auto* at = static_cast<const unsigned char*>(row);
  emulated::check_shared(at, 16);
  const auto rows = emulated::exchange(at);
  const unsigned first = emulated::lane() / 8 * 8;  // 8 rows are read at a time
  for (unsigned other = first; other < emulated::lane(); ++other) {
    const bool same_banks = (rows[other] - emulated::shared.data) / 16 % 8 == (at - emulated::shared.data) / 16 % 8;
    if (same_banks && rows[other] != at) ++emulated::bank_conflicts;
  }
  return rows;
}

inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(at) - emulated::shared.data);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const auto rows = matrix_rows(row);
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) std::memcpy(&r[i], rows[8 * i + g] + 4 * t, 4);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const auto rows = matrix_rows(row);
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t halves[2];
    for (unsigned j = 0; j < 2; ++j) std::memcpy(&halves[j], rows[8 * i + 2 * t + j] + 2 * g, 2);
    std::memcpy(&r[i], halves, 4);
  }
}

template <class T>
double dot(uint32_t a, uint32_t b, T) {
  T x[4 / sizeof(T)], y[4 / sizeof(T)];
  std::memcpy(x, &a, 4);
  std::memcpy(y, &b, 4);
  double sum = 0;
  for (unsigned i = 0; i < 4 / sizeof(T); ++i) sum += emulated::value(x[i]) * emulated::value(y[i]);
  return sum;
}

template <class D, class T>
void mma(D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const auto warp = emulated::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    double sum = d[i];
    for (unsigned word = 0; word < 8; ++word) {
      const uint32_t of_a = warp[4 * g + word % 4].a[i / 2 + 2 * (word / 4)];
      const uint32_t of_b = warp[4 * (2 * t + i % 2) + word % 4].b[word / 4];
      sum += dot(of_a, of_b, type);
    }
    d[i] = static_cast<D>(sum);
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  mma(d, a, b, type);
}

inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(d, a, b, int8_t{}); }

inline uint32_t pack2(float low, float high, __nv_bfloat16) {
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}

inline uint32_t pack2(float low, float high, __half) {
  return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
}

inline void cp_async_bytes(void* shared, const void* global, int bytes) {
  emulated::check_shared(shared, 16);
  if (bytes < 0 || bytes > 16 || (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    emulated::fail(cudaErrorMisalignedAddress);
    return;
  }
  std::memset(shared, emulated::kPoison, 16);
  emulated::me().copies.push_back({shared, global, bytes, emulated::me().groups});
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  cp_async_bytes(shared, global, valid ? 16 : 0);
}

inline void cp_async_commit() { ++emulated::me().groups; }

template <int n>
void cp_async_wait() {
  auto& copies = emulated::me().copies;
  while (!copies.empty() && copies.front().group + n < emulated::me().groups) {
    const auto& copy = copies.front();
    std::memset(copy.to, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    emulated::me().unfenced = true;
    copies.pop_front();
  }
}

inline float ex2(float x) { return exp2f(x); }

}  // namespace distilbert_fast
