// Which function of find_nearest.h a launch names, the same for both executions: use(kernel, params) calls it.
#pragma once

#include "find_nearest.h"
#include "queue.h"

namespace defgan::cuda {

template <class Use>
void with_nearest_kernel(const KernelLaunch& l, const Use& use) {
  const auto& content = *static_cast<const ContentParams*>(l.params);
  const auto& search = *static_cast<const NearestParams*>(l.params);
  switch (l.kernel) {
    case KernelId::kCompareContent: return use(std::integral_constant<KernelId, KernelId::kCompareContent>{}, content);
    case KernelId::kDecideStale: return use(std::integral_constant<KernelId, KernelId::kDecideStale>{}, content);
    case KernelId::kCopyContent: return use(std::integral_constant<KernelId, KernelId::kCopyContent>{}, content);
    case KernelId::kLargestPixel: return use(std::integral_constant<KernelId, KernelId::kLargestPixel>{}, search);
    case KernelId::kPackCandidates: return use(std::integral_constant<KernelId, KernelId::kPackCandidates>{}, search);
    case KernelId::kPackImages: return use(std::integral_constant<KernelId, KernelId::kPackImages>{}, search);
    case KernelId::kScore: return use(std::integral_constant<KernelId, KernelId::kScore>{}, search);
    case KernelId::kSelect: return use(std::integral_constant<KernelId, KernelId::kSelect>{}, search);
    default: return;
  }
}

template <KernelId kKernel, class Params>
DEFGAN_DEVICE void nearest_kernel(const Params& p) {
  if constexpr (kKernel == KernelId::kCompareContent) compare_content_kernel(p);
  if constexpr (kKernel == KernelId::kDecideStale) decide_stale_kernel(p);
  if constexpr (kKernel == KernelId::kCopyContent) copy_content_kernel(p);
  if constexpr (kKernel == KernelId::kLargestPixel) largest_pixel_kernel(p);
  if constexpr (kKernel == KernelId::kPackCandidates) pack_candidates_kernel(p);
  if constexpr (kKernel == KernelId::kPackImages) pack_images_kernel(p);
  if constexpr (kKernel == KernelId::kScore) score_kernel(p);
  if constexpr (kKernel == KernelId::kSelect) select_kernel(p);
}

}  // namespace defgan::cuda
