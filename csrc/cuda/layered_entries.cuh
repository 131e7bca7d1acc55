// Definitions for entries.cuh: packing, and the layered and split mappings.
#pragma once

#include "entries.cuh"
#include "packing.h"
#include "layered.h"

namespace defgan::cuda {

template <class S>
__global__ void __launch_bounds__(kPackThreads, 2) pack_entry(const __grid_constant__ PackParams p) {
  pack_kernel<S>(p);
}

// One block a multiprocessor: a warp's tile wants most of its registers.
template <class S>
__global__ void __launch_bounds__(kTeamThreads, 1) team_entry(const __grid_constant__ TeamParams p) {
  team_kernel<S>(p);
}

template <class S>
void launch_pack(const KernelLaunch& l, cudaStream_t stream) {
  pack_entry<S><<<l.blocks, l.threads, 0, stream>>>(*static_cast<const PackParams*>(l.params));
  check(cudaGetLastError(), "packing the weights");
}

template <class S>
void launch_team(const KernelLaunch& l, cudaStream_t stream) {
  // Cooperative: a barrier between blocks needs all of them to be resident.
  TeamParams p = *static_cast<const TeamParams*>(l.params);
  void* arguments[] = {&p};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&team_entry<S>), dim3(unsigned(l.blocks)),
                                    dim3(unsigned(l.threads)), arguments, l.shared_bytes, stream),
        "launching the team kernel");
}

}  // namespace defgan::cuda
