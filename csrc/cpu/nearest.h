// The nearest candidates on the CPU: packing decoded candidates, and comparing images with them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../candidate_pixels.h"
#include "packed_generator.h"

namespace defgan::cpu {

// Decoded candidates as levels (../nearest.h). Immutable once made.
struct Candidates {
  int64_t count = 0, pixels = 0;
  nearest::Scale scale{};
  std::vector<int16_t> levels;         // [group][pair of pixels][kCandidateGroup][2], zeros beyond count and pixels
  std::vector<int64_t> squared_norms;  // [count]: of the levels; kNotFinite where the image is not finite

  int64_t pairs() const { return (pixels + 1) / 2; }
  size_t bytes() const { return levels.size() * 2 + squared_norms.size() * 8; }
};

// Decodes latents [count, k] with the packed generator, piece by piece. Like find_nearest it throws where an interruption
// (interruption.h) ends it.
std::shared_ptr<const Candidates> decode_candidates(const Plan& plan, const PackedGenerator& generator,
                                                    const float* latents, int64_t count, int threads);

struct NearestArgs {
  const float* images;   // [B, pixels]
  const int64_t* draws;  // [B], or nullptr where all candidates take part
  int64_t images_count;  // B
  int64_t restarts;      // R, at most candidates.count
  int threads;           // at most
  int64_t* indices;      // out: [B, R]
};

void find_nearest(const Candidates& candidates, const NearestArgs& args);

}  // namespace defgan::cpu
