// Kernels for any machine: 128-bit vectors by the compiler's vector extensions, so SSE2 on x86-64 and NEON
// on arm64. No std:: templates here or in what it includes (see kernels_avx2.cpp).
#include "instruction_sets.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace defgan::cpu {
namespace {

struct Vector {
  typedef float T __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef int32_t Signed __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kAheadVectors = 0, kSoonSteps = 0;
  static constexpr bool kAheadChoice = false;
  static T load(const float* p) {
    T v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static void store(float* p, T v) { __builtin_memcpy(p, &v, 16); }
  static T all(float x) { return T{x, x, x, x}; }
  static T broadcast(const float* p) { return all(*p); }
  static T zero() { return T{}; }
  static T add(T a, T b) { return a + b; }
  static T sub(T a, T b) { return a - b; }
  static T mul(T a, T b) { return a * b; }
  static T div(T a, T b) { return a / b; }
#if defined(__aarch64__)
  static T fma(T a, T b, T c) { return vfmaq_f32(c, a, b); }
#else
  static T fma(T a, T b, T c) { return a * b + c; }  // no fused form in SSE2: rounds twice
#endif
  static T select(Signed mask, T a, T b) { return (T)(((Bits)a & (Bits)mask) | ((Bits)b & ~(Bits)mask)); }
  static T min(T a, T b) { return select(a < b, a, b); }
  static T max(T a, T b) { return select(a > b, a, b); }
  static T select_positive(T x, T a, T b) { return select(x > zero(), a, b); }
  static T select_nan(T x, T a, T b) { return select(x != x, a, b); }
  static T round(T x) {  // to nearest even for |x| < 2^22, by adding and taking away 1.5 * 2^23
    const T magic = all(12582912.0f);
    T shifted = x + magic;
    keep(shifted);  // or the compiler may simplify under -ffast-math
    return shifted - magic;
  }
  static T power_of_two(T n) {
    const Signed exponent = __builtin_convertvector(n, Signed) + 127;
    return (T)(exponent << 23);
  }
  // Lane i: the sum of the lanes of v[i], all in the same order.
  static T sums(const T (&v)[kLanes]) {
    T result;
    for (int i = 0; i < kLanes; ++i) result[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    return result;
  }
  static T lower_bfloat16(T x) { return (T)((Bits)x << 16); }
  static T upper_bfloat16(T x) { return (T)((Bits)x & Bits{0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u}); }
  static T dot_bfloat16(T acc, T x, T w) {
    acc = fma(lower_bfloat16(x), lower_bfloat16(w), acc);
    return fma(upper_bfloat16(x), upper_bfloat16(w), acc);
  }
  static T load_bfloat16(const uint16_t* p) { return (T)(Bits{p[0], p[1], p[2], p[3]} << 16); }
  static void store_bfloat16(uint16_t* p, T v) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    const Bits nan = (Bits)(v != v), result = (quiet & nan) | (rounded & ~nan);
    for (int i = 0; i < 4; ++i) p[i] = uint16_t(result[i]);
  }
#if defined(__aarch64__)
  static void keep(T& v) { asm volatile("" : "+w"(v)); }
#elif defined(__x86_64__)
  static void keep(T& v) { asm volatile("" : "+x"(v)); }
#else
  static void keep(T& v) { asm volatile("" : "+m"(v)); }
#endif
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
  Tiles<Bfloat16<Vector>, 4, 1, 1, false>::fill(bfloat16);
  Elementwise<Bfloat16<Vector>>::fill(bfloat16);
  Image<Vector>::fill(image);
  return {"baseline", &float32, &bfloat16, &image};
}

}  // namespace

const InstructionSet& baseline_kernels() {
  static const InstructionSet set = make();
  return set;
}

}  // namespace defgan::cpu
