// What the kernels use of a GPU: threads and barriers, memory accesses by kind, the tensor cores' fragments, rounding.
// The kernels are written against this header alone, so one source has two executions: compiled by nvcc
// (device_cuda.h: intrinsics and PTX) and by any C++17 compiler (device_cpu.h: one fiber per thread, with every access
// and every barrier checked). docs/gpu.md describes the second.
//
// nvcc needs --expt-relaxed-constexpr (integral constants are used in device code).
#pragma once

#include "device_types.h"

#ifdef __CUDACC__
#include "device_cuda.h"
#else
#include "device_cpu.h"
#endif
