// Kernels for AVX-512 with BF16: the dot product of bfloat16 pairs. float32 is that of kernels_avx512.cpp.
// See kernels_avx2.cpp for why no flags and no std::.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12: false, from inside its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "instruction_sets.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

namespace defgan::cpu {
namespace {

#include "vector_avx512.h"

struct Vector : Vector512 {
  static T dot_bfloat16(T acc, T x, T w) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w); }
  static T load_bfloat16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
  static void store_bfloat16(uint16_t* p, T v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

#include "storage.h"
#include "gather_gemm.h"
#include "elementwise.h"

KernelTable bfloat16;

InstructionSet make() {
  bfloat16.name = "avx512_bf16";
  Tiles<Bfloat16<Vector>, 14, 6, 2>::fill(bfloat16);
  Elementwise<Bfloat16<Vector>>::fill(bfloat16);
  const InstructionSet& wide = avx512_kernels();
  return {"avx512_bf16", wide.float32, &bfloat16, wide.image};
}

}  // namespace

const InstructionSet& avx512_bf16_kernels() {
  static const InstructionSet set = make();
  return set;
}

}  // namespace defgan::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
