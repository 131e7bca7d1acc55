// torch's threads for the CPU kernels.
#pragma once

namespace defgan {

// Teams run on torch's threads from now on, where it has an OpenMP runtime.
void lend_torch_threads();

}  // namespace defgan
