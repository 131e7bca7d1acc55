// Packing and the team kernel in bfloat16.
#include "layered_entries.cuh"

namespace defgan::cuda {

template void launch_pack<Bfloat16>(const KernelLaunch&, cudaStream_t);
template void launch_team<Bfloat16>(const KernelLaunch&, cudaStream_t);

}  // namespace defgan::cuda
