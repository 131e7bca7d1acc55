// The kernels' entry points on a GPU. Each .cu file instantiates the launchers of one precision, so that they compile
// side by side.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "queue.h"

namespace defgan::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a refused launch must not be reported again by somebody else's next check
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class S>
void launch_pack(const KernelLaunch& launch, cudaStream_t stream);
template <class S>
void launch_team(const KernelLaunch& launch, cudaStream_t stream);
template <class S>
void launch_fused(const KernelLaunch& launch, cudaStream_t stream);

void launch_keep(const KernelLaunch& launch, cudaStream_t stream);
void launch_nearest(const KernelLaunch& launch, cudaStream_t stream);

}  // namespace defgan::cuda
