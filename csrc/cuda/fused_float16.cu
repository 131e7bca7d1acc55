// The fused kernels in float16.
#include "fused_entries.cuh"

namespace defgan::cuda {

template void launch_fused<Half>(const KernelLaunch&, cudaStream_t);

}  // namespace defgan::cuda
