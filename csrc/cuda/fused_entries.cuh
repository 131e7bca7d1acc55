// Definitions for entries.cuh: the fused mapping.
#pragma once

#include "entries.cuh"
#include "fused.h"

namespace defgan::cuda {

// Other architectures have too little shared memory for it, and schedule_projection never asks for it there; an empty
// body keeps their part of the library small.
template <class S, class G>
__global__ void __launch_bounds__(kFusedThreads, 1) fused_entry(const __grid_constant__ FusedParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1100
  fused_kernel<S, G>(p);
#endif
}

template <class S>
void launch_fused(const KernelLaunch& l, cudaStream_t stream) {
  with_geometry(l.geometry, [&](auto g) {
    const auto entry = &fused_entry<S, decltype(g)>;
    // Made from the PTX of an older architecture it would be the empty body, and leave the latents unwritten.
    cudaFuncAttributes compiled;
    check(cudaFuncGetAttributes(&compiled, entry), "asking for the fused kernel's attributes");
    if (compiled.ptxVersion < 90 || compiled.ptxVersion >= 110)
      throw std::runtime_error(
          "the fused kernel was not compiled for this GPU: build with its architecture in "
          "TORCH_CUDA_ARCH_LIST");
    check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared_bytes)),
          "asking for the fused kernel's shared memory");
    entry<<<l.blocks, l.threads, l.shared_bytes, stream>>>(*static_cast<const FusedParams*>(l.params));
    check(cudaGetLastError(), "launching the fused kernel");
  });
}

}  // namespace defgan::cuda
