// The projection on the CPU: L momentum steps on every row's latent, through the packed generator.
#pragma once

#include <cstdint>

#include "../descent.h"
#include "packed_generator.h"
#include "stopwatch.h"

namespace defgan::cpu {

struct ProjectArgs {
  const float* images;   // [B, pixels]
  const float* start;    // latents [R, k] or [B, R, k]
  bool start_per_image;  // which of the two
  int64_t images_count;  // B
  int restarts;          // R
  Descent descent;
  const float* velocities;  // [B, R, k], with which a descent goes on; nullptr: it begins, with velocities of zero
  int threads;              // at most
  int64_t max_rows;         // rows in flight at most; 0: as many as keep working memory under 200 MB
  float* latents;           // out: [B, R, k]
  float* errors;            // out: [B, R], mean squared error after the last step
  float* velocities_out;    // out: [B, R, k] after the last step, or nullptr
  Profile* profile;         // out: added to, or nullptr
};

// An interruption (interruption.h) ends it between two steps and throws; then nothing that is out is complete.
void project(const PackedGenerator& generator, const ProjectArgs& args);

// images [count, pixels] = G(latents [count, k]), in float32 whatever the generator's precision. Interrupted like project.
void decode(const PackedGenerator& generator, const float* latents, int64_t count, int threads, int64_t max_rows,
            float* images);

}  // namespace defgan::cpu
