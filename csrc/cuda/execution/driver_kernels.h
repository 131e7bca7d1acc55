// One thread of any kernel, by precision: each is a compilation of driver_kernels.cpp, so that they compile side by side.
#pragma once

#include "../queue.h"

namespace defgan::cuda {

void run_float32(const KernelLaunch& launch);
void run_float16(const KernelLaunch& launch);
void run_bfloat16(const KernelLaunch& launch);
void run_keep(const KernelLaunch& launch);     // of no precision
void run_nearest(const KernelLaunch& launch);  // of no precision

}  // namespace defgan::cuda
