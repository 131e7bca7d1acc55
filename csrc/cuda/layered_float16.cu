// Packing and the team kernel in float16.
#include "layered_entries.cuh"

namespace defgan::cuda {

template void launch_pack<Half>(const KernelLaunch&, cudaStream_t);
template void launch_team<Half>(const KernelLaunch&, cudaStream_t);

}  // namespace defgan::cuda
