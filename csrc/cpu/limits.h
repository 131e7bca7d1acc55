// The machine's own limit: the rate of register-only multiply-adds, to which kernels are compared.
#pragma once

#include "packed_generator.h"

namespace defgan::cpu {

// GFLOP/s of `threads` threads together, measured over about `seconds`.
double multiply_add_limit(const InstructionSet& set, Precision precision, int threads, double seconds);

}  // namespace defgan::cpu
