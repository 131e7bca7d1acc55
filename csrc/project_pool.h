// torch's threads for the CPU kernels, and how many of them a call uses.
#pragma once

namespace defgan {

// Teams run on torch's threads from now on, where it has an OpenMP runtime.
void lend_torch_threads();

// Threads for a call that begins now: torch's number, but no more than there are cores for this process, by its affinity
// and by the quota of its control group. The quota is read once.
int usable_threads();

}  // namespace defgan
