// What both halves of the op ask of their arguments, in the same words: one line that names the argument, what was
// expected and what came. Includes torch.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "legs.h"
#include "plan.h"

namespace defgan {

using at::Tensor;

inline const char* name_of(at::ScalarType type) {
  switch (type) {
    case at::kByte: return "uint8";
    case at::kChar: return "int8";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    case at::kBool: return "bool";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    default: return c10::toString(type);
  }
}

inline std::string text(at::IntArrayRef sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << "]";
  return out.str();
}

// Errors of the torch-free layers keep their words and become Python's ValueError.
template <class Body>
auto translated(const Body& body) {
  try {
    return body();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

inline Plan plan_of(const std::string& description) {
  return translated([&] { return parse_plan(description); });
}

inline void check_floating(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf,
                   name, " must have dtype float32, bfloat16 or float16, got ", name_of(t.scalar_type()));
}

inline void check_max_rows(int64_t max_rows) {
  TORCH_CHECK_VALUE(max_rows >= 0, "max_rows must be at least 0 (0: automatic), got ", max_rows);
}

// Of `project`: types, shapes and devices.
inline void check_projection(const Plan& plan, const Tensor& images, const Tensor& z0, int64_t max_rows) {
  const int64_t k = plan.latent_size();
  check_floating(images, "images");
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == plan.image.c && images.size(2) == plan.image.h &&
                        images.size(3) == plan.image.w,
                    "images must have shape [B, ", plan.image.c, ", ", plan.image.h, ", ", plan.image.w, "], got ",
                    text(images.sizes()));
  check_floating(z0, "z0");
  const int64_t count = images.size(0);
  const bool per_image = z0.dim() == 3;
  TORCH_CHECK_VALUE(
      (z0.dim() == 2 || per_image) && z0.size(-1) == k && z0.size(-2) >= 1 && (!per_image || z0.size(0) == count),
      "z0 must have shape [R, ", k, "] or [", count, ", R, ", k, "] with R at least 1, got ", text(z0.sizes()));
  TORCH_CHECK_VALUE(z0.device() == images.device(), "z0 must be on the images' device (", images.device().str(),
                    "), got ", z0.device().str());
  check_max_rows(max_rows);
}

inline void check_radius(double radius) {
  TORCH_CHECK_VALUE(std::isfinite(radius) && radius >= 0, "radius must be finite and at least 0 (0: free), got ",
                    radius);
}

// Of `project_keeping`: which rows go on.
inline std::vector<Keep> checked_keep(at::IntArrayRef steps, at::IntArrayRef rows, int64_t all_steps) {
  TORCH_CHECK_VALUE(steps.size() == rows.size(), "keep_steps and keep_rows must have the same length, got ",
                    steps.size(), " and ", rows.size());
  std::vector<Keep> keep;
  for (size_t i = 0; i < steps.size(); ++i) {
    TORCH_CHECK_VALUE(steps[i] >= 0 && steps[i] < all_steps && (i == 0 || steps[i] > steps[i - 1]),
                      "keep_steps must rise and lie in [0, ", all_steps, "), got ", text(steps));
    TORCH_CHECK_VALUE(rows[i] >= 1 && (i == 0 || rows[i] <= rows[i - 1]),
                      "keep_rows must be at least 1 and never rise, got ", text(rows));
    keep.push_back({steps[i], rows[i]});
  }
  return keep;
}

// Of `decode`.
inline void check_decoding(const Plan& plan, const Tensor& latents, int64_t max_rows) {
  check_floating(latents, "latents");
  TORCH_CHECK_VALUE(latents.dim() == 2 && latents.size(1) == plan.latent_size(), "latents must have shape [B, ",
                    plan.latent_size(), "], got ", text(latents.sizes()));
  check_max_rows(max_rows);
}

// A parameter as the kernels read it: float32, contiguous, on the device of everything else.
inline Tensor checked_parameter(const Tensor& parameter, const at::Device& device) {
  TORCH_CHECK_TYPE(parameter.is_floating_point(), "parameters must be floating point, got ",
                   name_of(parameter.scalar_type()));
  TORCH_CHECK_VALUE(parameter.device() == device, "parameters must be on the images' device (", device.str(), "), got ",
                    parameter.device().str());
  return parameter.detach().to(at::kFloat).contiguous();
}

// `low` and `high` are the least and the greatest pixel.
inline void check_range(const Plan& plan, bool finite, float low, float high) {
  constexpr const char* kOtherwise = " (with validate=False an image that is not shows it in its own errors)";
  TORCH_CHECK_VALUE(finite, "images must be finite", kOtherwise);
  const Activation last = plan.layers.back().activation;
  if (last != Activation::kSigmoid && last != Activation::kTanh) return;
  const float from = last == Activation::kSigmoid ? 0.0f : -1.0f, tolerance = 0.01f * (1.0f - from);
  TORCH_CHECK_VALUE(low >= from - tolerance && high <= 1.0f + tolerance, "images must lie in the generator's range [",
                    from, ", 1], got [", low, ", ", high, "]", kOtherwise);
}

}  // namespace defgan
