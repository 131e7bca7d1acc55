// Products with candidates on any machine: SSE2 on x86-64, NEON on arm64, else a loop.
#include "../candidate_pixels.h"
#include "nearest_kernels.h"
#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace defgan::cpu {
namespace {

#if defined(__x86_64__)
struct Integers {
  using T = __m128i;
  static constexpr int kLanes = 4;
  static T zero() { return _mm_setzero_si128(); }
  static T all(int32_t x) { return _mm_set1_epi32(x); }
  static T load(const int16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void store(int32_t* p, T v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  static T add(T a, T b) { return _mm_add_epi32(a, b); }
  static T multiply_pairs(T a, T b) { return _mm_madd_epi16(a, b); }
};
#elif defined(__aarch64__)
struct Integers {
  using T = int32x4_t;
  static constexpr int kLanes = 4;
  static T zero() { return vdupq_n_s32(0); }
  static T all(int32_t x) { return vdupq_n_s32(x); }
  static T load(const int16_t* p) { return vreinterpretq_s32_s16(vld1q_s16(p)); }
  static void store(int32_t* p, T v) { vst1q_s32(p, v); }
  static T add(T a, T b) { return vaddq_s32(a, b); }
  static T multiply_pairs(T a, T b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
  }
};
#else
struct Integers {
  using T = int32_t;
  static constexpr int kLanes = 1;
  static T zero() { return 0; }
  static T all(int32_t x) { return x; }
  static T load(const int16_t* p) {
    T v;
    __builtin_memcpy(&v, p, 4);
    return v;
  }
  static void store(int32_t* p, T v) { *p = v; }
  static T add(T a, T b) { return a + b; }
  static T multiply_pairs(T a, T b) {
    return int32_t(int16_t(a)) * int16_t(b) + int32_t(int16_t(a >> 16)) * int16_t(b >> 16);
  }
};
#endif

#include "candidate_products.h"

}  // namespace

void candidate_products_baseline(const CandidateProducts& p) { all_products<Integers, 2>(p); }

}  // namespace defgan::cpu
