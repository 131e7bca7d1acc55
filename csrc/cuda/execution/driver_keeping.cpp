// The kernel that chooses the rows that go on, compiled for the CPU.
#include "../keep_rows.h"
#include "driver_kernels.h"

namespace defgan::cuda {

void run_keep(const KernelLaunch& l) { keep_kernel(*static_cast<const KeepParams*>(l.params)); }

}  // namespace defgan::cuda
