// The kernels of one precision, compiled for the CPU: DEFGAN_STORAGE and DEFGAN_RUN name the storage and the function.
#include "driver_kernels.h"

#include "../fused.h"
#include "../packing.h"
#include "../layered.h"

namespace defgan::cuda {

void DEFGAN_RUN(const KernelLaunch& l) {
  using S = DEFGAN_STORAGE;
  if (l.kernel == KernelId::kPack) return pack_kernel<S>(*static_cast<const PackParams*>(l.params));
  if (l.kernel == KernelId::kTeam) return team_kernel<S>(*static_cast<const TeamParams*>(l.params));
  if constexpr (!std::is_same_v<S, float>)
    with_geometry(l.geometry,
                  [&](auto g) { fused_kernel<S, decltype(g)>(*static_cast<const FusedParams*>(l.params)); });
}

}  // namespace defgan::cuda
