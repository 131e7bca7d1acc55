// Kernels for AVX2 with fused multiply-add.
//
// The target is set here and not by a compiler flag, so that every way of building (ahead of time, on first
// import, CMake) gets it right. Code under a wide target must not leak: a std:: template instantiated here
// could be the copy that the linker keeps for the whole module. So these files use none, and all that they
// define but one function has internal linkage.
#if defined(__x86_64__)
#include <immintrin.h>

#include "instruction_sets.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace defgan::cpu {
namespace {

struct Vector {
  using T = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kAheadVectors = 8, kSoonSteps = 0;
  static constexpr bool kAheadChoice = true;
  static T load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static T all(float x) { return _mm256_set1_ps(x); }
  static T broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static T zero() { return _mm256_setzero_ps(); }
  static T add(T a, T b) { return _mm256_add_ps(a, b); }
  static T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static T div(T a, T b) { return _mm256_div_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static T min(T a, T b) { return _mm256_min_ps(a, b); }
  static T max(T a, T b) { return _mm256_max_ps(a, b); }
  static T select_positive(T x, T a, T b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero(), _CMP_GT_OQ)); }
  static T select_nan(T x, T a, T b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
  static T round(T x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static T power_of_two(T n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  // Lane i: the sum of the lanes of v[i], all in the same order.
  static T sums(const T (&v)[kLanes]) {
    const T a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const T b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  static T lower_bfloat16(T x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
  static T upper_bfloat16(T x) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(int(0xffff0000u))));
  }
  static T dot_bfloat16(T acc, T x, T w) {
    acc = fma(lower_bfloat16(x), lower_bfloat16(w), acc);
    return fma(upper_bfloat16(x), upper_bfloat16(w), acc);
  }
  static T load_bfloat16(const uint16_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
  static void store_bfloat16(uint16_t* p, T v) {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
  }
  static void keep(T& v) { asm volatile("" : "+x"(v)); }
};

#include "storage.h"
#include "gather_gemm.h"
#include "elementwise.h"

KernelTable float32, bfloat16;
ImageKernels image;

InstructionSet make() {
  // 16 registers: 6 x 2 accumulators, two weights, one broadcast.
  Tiles<Float32<Vector>, 6, 2, 1, false>::fill(float32);
  Elementwise<Float32<Vector>>::fill(float32);
  // The emulated dot product needs both halves of its operands in registers.
  Tiles<Bfloat16<Vector>, 4, 1, 1, false>::fill(bfloat16);
  Elementwise<Bfloat16<Vector>>::fill(bfloat16);
  Image<Vector>::fill(image);
  return {"avx2", &float32, &bfloat16, &image};
}

}  // namespace

const InstructionSet& avx2_kernels() {
  static const InstructionSet set = make();
  return set;
}

}  // namespace defgan::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
