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
#include "vector_avx512_bf16.h"
using Vector = Vector512Bf16;

#include "storage.h"
#include "gather_gemm.h"
#include "elementwise.h"

KernelTable bfloat16;

InstructionSet make() {
  Tiles<Bfloat16<Vector>, 14, 6, 2, true>::fill(bfloat16);
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
