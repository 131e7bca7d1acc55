// What both halves of the op `nearest` ask of their arguments. Includes torch.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "candidate_pixels.h"
#include "project_checks.h"

namespace defgan {

inline void check_nearest(const Plan& plan, const Tensor& images, const Tensor& candidates, int64_t restarts,
                          const std::optional<Tensor>& draws) {
  const int64_t k = plan.latent_size(), pixels = plan.image.elements();
  check_floating(images, "images");
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == plan.image.c && images.size(2) == plan.image.h &&
                        images.size(3) == plan.image.w,
                    "images must have shape [B, ", plan.image.c, ", ", plan.image.h, ", ", plan.image.w, "], got ",
                    text(images.sizes()));
  check_floating(candidates, "candidates");
  TORCH_CHECK_VALUE(candidates.dim() == 2 && candidates.size(1) == k && candidates.size(0) >= 1,
                    "candidates must have shape [N, ", k, "] with N at least 1, got ", text(candidates.sizes()));
  TORCH_CHECK_VALUE(candidates.device() == images.device(), "candidates must be on the images' device (",
                    images.device().str(), "), got ", candidates.device().str());
  const int64_t count = candidates.size(0), most = nearest::kMaxBytes / (2 * pixels);
  TORCH_CHECK_VALUE(count <= most, "candidates must be at most ", most, " for images of ", pixels,
                    " pixels (200 MB of 16 bits each), got ", count);
  TORCH_CHECK_VALUE(restarts >= 1 && restarts <= count,
                    "restarts must be at least 1 and at most the number of candidates (", count, "), got ", restarts);
  if (!draws) return;
  TORCH_CHECK_TYPE(draws->scalar_type() == at::kLong, "draws must have dtype int64, got ",
                   name_of(draws->scalar_type()));
  TORCH_CHECK_VALUE(draws->dim() == 1 && draws->size(0) == images.size(0), "draws must have shape [", images.size(0),
                    "], got ", text(draws->sizes()));
  TORCH_CHECK_VALUE(draws->device() == images.device(), "draws must be on the images' device (", images.device().str(),
                    "), got ", draws->device().str());
}

}  // namespace defgan
