// Packing and the team kernel in float32.
#include "layered_entries.cuh"

namespace defgan::cuda {

template void launch_pack<float>(const KernelLaunch&, cudaStream_t);
template void launch_team<float>(const KernelLaunch&, cudaStream_t);

}  // namespace defgan::cuda
