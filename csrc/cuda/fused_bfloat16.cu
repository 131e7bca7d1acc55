// The fused kernels in bfloat16.
#include "fused_entries.cuh"

namespace defgan::cuda {

template void launch_fused<Bfloat16>(const KernelLaunch&, cudaStream_t);

}  // namespace defgan::cuda
