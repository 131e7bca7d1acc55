// How latents descend: what every backend's loop of steps is told. Kernels on a GPU get it as it stands.
#pragma once

#include <cstdint>

namespace defgan {

struct Descent {
  const float* rates;  // the learning rate of each step, [steps], where the backend's kernels read it
  int32_t steps;       // L
  float momentum;
  float radius;  // the norm to which latents are scaled at the start and after every step; 0: they are free
};

}  // namespace defgan
