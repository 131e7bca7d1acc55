// What the host hands to the kernels that find the nearest candidates (find_nearest.h).
#pragma once

#include "params.h"

namespace defgan::cuda {

constexpr int kNearestThreads = 256, kNearestWarps = kNearestThreads / kLanes;
constexpr int kQuadPixels = 8;      // levels of 16 bytes, what a lane loads at once
constexpr int kScoreImages = 8;     // that a block compares with its candidates at a time
constexpr int kScoreQuads = 64;     // of an image that are in shared memory at a time
constexpr int kLargestBlocks = 64;  // that look for the brightest pixel
// Shared memory of a block: the images' quads of 16 bytes, and a score with its index for each thread.
constexpr int kScoreSharedBytes = kScoreImages * kScoreQuads * 16;
constexpr int kSelectSharedBytes = kNearestThreads * 16;

// The tensors that decoded candidates depend on, and the copy of their words for which the kept candidates were made.
// One address and one count each is what a launch's arguments (4 KB) have room for.
struct ContentParams {
  const float* data[kMaxParameters + 1];  // the parameters, then the candidates' latents
  int32_t words[kMaxParameters + 1];
  int32_t count;      // of tensors
  int32_t blocks;     // that compare
  uint32_t* copy;     // kept: all words, one tensor after the other
  uint32_t* valid;    // kept: 0 until a copy was made
  uint32_t* differs;  // [blocks]
  uint32_t* stale;
};
static_assert(sizeof(ContentParams) <= 4096);

struct NearestParams {
  const uint32_t* stale;  // 0: the kept candidates are those of these parameters, and stay
  // Candidates: count of them, of `pixels` pixels in `quads` groups of kQuadPixels.
  int32_t count, pixels, quads;
  int32_t is_bounded, is_sigmoid;
  const float* decoded;  // [piece_rows, pixels]
  int32_t piece_first, piece_rows;
  float* largest;          // kept: [kLargestBlocks], of the pixels where the plan does not bound them
  char* levels;            // kept: [group of kLanes candidates][quad][candidate of the group][kQuadPixels] of 16 bits
  int64_t* squared_norms;  // kept: [count]
  // Images, those of one round.
  const float* images;   // [image_count, pixels]
  const int64_t* draws;  // [image_count], or nullptr
  int32_t image_count, restarts;
  char* words;       // [image_count][quad][kQuadPixels] of 16 bits
  int64_t* factors;  // [image_count]: what products are multiplied by in scores; 0: the image is not finite
  int64_t* scores;   // [image_count][count]
  int64_t* indices;  // out: [image_count][restarts]
};

}  // namespace defgan::cuda
