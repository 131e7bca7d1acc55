// Products with candidates for AVX-512 (F, BW). See kernels_avx2.cpp for why no flags and no std::.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../candidate_pixels.h"
#include "nearest_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw")
#endif

namespace defgan::cpu {
namespace {

struct Integers {
  using T = __m512i;
  static constexpr int kLanes = 16;
  static T zero() { return _mm512_setzero_si512(); }
  static T all(int32_t x) { return _mm512_set1_epi32(x); }
  static T load(const int16_t* p) { return _mm512_loadu_si512(reinterpret_cast<const __m512i*>(p)); }
  static void store(int32_t* p, T v) { _mm512_storeu_si512(reinterpret_cast<__m512i*>(p), v); }
  static T add(T a, T b) { return _mm512_add_epi32(a, b); }
  static T multiply_pairs(T a, T b) { return _mm512_madd_epi16(a, b); }
};

#include "candidate_products.h"

}  // namespace

void candidate_products_avx512(const CandidateProducts& p) { all_products<Integers, 8>(p); }

}  // namespace defgan::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
