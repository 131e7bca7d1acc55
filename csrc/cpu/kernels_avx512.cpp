// Kernels for AVX-512 (F, BW, VL, DQ), float32. bfloat16 on machines without its dot product is emulated, and
// the AVX2 file's kernels do that as well as wider ones could. See kernels_avx2.cpp for why no flags and no std::.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12: false, from inside its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "instruction_sets.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace defgan::cpu {
namespace {

#include "vector_avx512.h"
using Vector = Vector512;

#include "storage.h"
#include "gather_gemm.h"
#include "elementwise.h"

KernelTable float32;
ImageKernels image;

InstructionSet make() {
  // 32 registers: 14 x 2 accumulators, two weights, one broadcast.
  Tiles<Float32<Vector>, 14, 6, 2, true>::fill(float32);
  Elementwise<Float32<Vector>>::fill(float32);
  Image<Vector>::fill(image);
  return {"avx512", &float32, avx2_kernels().bfloat16, &image};
}

}  // namespace

const InstructionSet& avx512_kernels() {
  static const InstructionSet set = make();
  return set;
}

}  // namespace defgan::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
