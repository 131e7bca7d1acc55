// A hash of parameters' contents, by which caches notice that weights have changed however they were changed.
#pragma once

#include <cstdint>
#include <vector>

#include "packed_generator.h"

namespace defgan::cpu {

struct Hash {
  uint64_t a = 0x9e3779b97f4a7c15u, b = 0xc2b2ae3d27d4eb4fu;
  bool operator==(const Hash& o) const { return a == o.a && b == o.b; }
};

// The hash of all parameters in their order. `threads` share the work where it is worth it; the result does not depend on
// their number.
Hash hash_of(const std::vector<Parameter>& parameters, int threads);

}  // namespace defgan::cpu
