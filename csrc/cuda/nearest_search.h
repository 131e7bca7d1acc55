// The nearest candidates on a GPU, as the binding sees it: what is kept between calls, and one call that only enqueues.
#pragma once

#include "queue.h"

namespace defgan::cuda {

struct SearchSizes {
  size_t kept_bytes = 0;       // decoded candidates and the copy of what they were decoded from
  size_t workspace_bytes = 0;  // of one call
};

struct SearchArgs {
  const float* candidates;  // device, latents [N, k]
  int64_t count;            // N
  const float* images;      // device, [B, pixels]
  const int64_t* draws;     // device, [B], or nullptr where all candidates take part
  int64_t images_count;     // B
  int64_t restarts;         // R, at most N
  void* kept;               // device, kept_bytes, 256-byte aligned; contents arbitrary where *valid is 0
  uint32_t* valid;          // device, kept: 0 when it is new
  void* workspace;          // device, workspace_bytes, 256-byte aligned
  int64_t* indices;         // device, out: [B, R]
};

// `program` is the plan's in float32. Throws std::invalid_argument where the device or the sizes are beyond the kernels.
SearchSizes search_sizes(const Program& program, const std::vector<Parameter>& parameters, const Device& device,
                         int64_t count, int64_t images_count);

void find_nearest(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                  const Device& device, const SearchArgs& args);
void find_nearest(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                  const Device& device, const SearchArgs& args, void* stream);

}  // namespace defgan::cuda
