// The projection on the CPU: L momentum steps on every row's latent, through the packed generator.
#pragma once

#include <cstdint>
#include <vector>

#include "packed_generator.h"

namespace defgan::cpu {

// Where a projection's time goes: seconds summed over its threads. A layer's time is its products with what is
// fused into them; `waiting` is the time in barriers. Measured only where ProjectArgs names one.
struct Profile {
  std::vector<double> forward, backward;  // by layer
  double image = 0, latent = 0, waiting = 0;
};

struct ProjectArgs {
  const float* images;   // [B, pixels]
  const float* start;    // latents [R, k] or [B, R, k]
  bool start_per_image;  // which of the two
  int64_t images_count;  // B
  int restarts;          // R
  const float* rates;    // learning rate of each step, [steps]
  int steps;             // L
  float momentum;
  int threads;       // at most
  int64_t max_rows;  // rows in flight at most; 0: as many as keep working memory under 200 MB
  float* latents;    // out: [B, R, k]
  float* errors;     // out: [B, R], mean squared error after the last step
  Profile* profile;  // out: added to, or nullptr
};

void project(const PackedGenerator& generator, const ProjectArgs& args);

// images [count, pixels] = G(latents [count, k]), in float32 whatever the generator's precision.
void decode(const PackedGenerator& generator, const float* latents, int64_t count, int threads, int64_t max_rows,
            float* images);

}  // namespace defgan::cpu
