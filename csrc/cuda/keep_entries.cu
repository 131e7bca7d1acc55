// The entry point of keep_rows.h.
#include "keep_rows.h"

#include "entries.cuh"

namespace defgan::cuda {

__global__ void __launch_bounds__(kKeepThreads) keep_entry(const __grid_constant__ KeepParams p) { keep_kernel(p); }

void launch_keep(const KernelLaunch& l, cudaStream_t stream) {
  keep_entry<<<unsigned(l.blocks), unsigned(l.threads), 0, stream>>>(*static_cast<const KeepParams*>(l.params));
  check(cudaGetLastError(), "choosing the rows that go on");
}

}  // namespace defgan::cuda
