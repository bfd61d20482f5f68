// The instructions of AMX: eight tile registers of up to 16 rows of 64 bytes.
//
// The instructions are written out: gcc 12's intrinsics tell the compiler neither that ldtilecfg reads 64 bytes nor
// that tileloadd reads memory, so that stores before them were dropped. A tile is named by a number known when
// compiled.
#pragma once

#include <cstdint>

namespace distilbert_fast {
namespace {

inline void tile_configure(const uint8_t (&configuration)[64]) {
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
}

inline void tile_release() { __asm__ volatile("tilerelease"); }

template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}

// Rows lie `stride` bytes apart.
template <int T>
inline void tile_load(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(T) : "memory");
}

// C += A · B with C [16, 16] of int32, A [16, 64] and B [16, 16, 4] of int8: C_mn += Σ_k Σ_i A_m,4k+i · B_kni.
template <int C, int A, int B>
inline void tile_multiply_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// The same of float, and of pairs of bfloat16; subnormals count as zero and become zero.
template <int C, int A, int B>
inline void tile_multiply_bfloat16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace distilbert_fast
