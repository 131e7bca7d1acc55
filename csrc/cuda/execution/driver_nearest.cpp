// The kernels that find the nearest candidates, compiled for the CPU.
#include "../nearest_by_id.h"
#include "driver_kernels.h"

namespace defgan::cuda {

void run_nearest(const KernelLaunch& l) {
  with_nearest_kernel(l, [](auto kernel, const auto& params) { nearest_kernel<decltype(kernel)::value>(params); });
}

}  // namespace defgan::cuda
