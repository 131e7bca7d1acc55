// The entry points of find_nearest.h.
#include "entries.cuh"
#include "nearest_by_id.h"

namespace defgan::cuda {

template <KernelId kKernel, class Params>
__global__ void __launch_bounds__(kNearestThreads, 2) nearest_entry(const __grid_constant__ Params p) {
  nearest_kernel<kKernel>(p);
}

void launch_nearest(const KernelLaunch& l, cudaStream_t stream) {
  with_nearest_kernel(l, [&](auto kernel, const auto& params) {
    nearest_entry<decltype(kernel)::value><<<unsigned(l.blocks), unsigned(l.threads), l.shared_bytes, stream>>>(params);
  });
  check(cudaGetLastError(), "finding the nearest candidates");
}

}  // namespace defgan::cuda
