// Products with candidates for AVX2. See kernels_avx2.cpp for why no flags and no std::.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../candidate_pixels.h"
#include "nearest_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

namespace defgan::cpu {
namespace {

struct Integers {
  using T = __m256i;
  static constexpr int kLanes = 8;
  static T zero() { return _mm256_setzero_si256(); }
  static T all(int32_t x) { return _mm256_set1_epi32(x); }
  static T load(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, T v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static T add(T a, T b) { return _mm256_add_epi32(a, b); }
  static T multiply_pairs(T a, T b) { return _mm256_madd_epi16(a, b); }
};

#include "candidate_products.h"

}  // namespace

void candidate_products_avx2(const CandidateProducts& p) { all_products<Integers, 4>(p); }

}  // namespace defgan::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
