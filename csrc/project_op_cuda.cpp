// The GPU's half of the torch ops; compiled only where the CUDA kernels are. A call checks its arguments, takes one
// block of working memory from torch's allocator and enqueues kernels on the current stream. It waits for nothing,
// so a CUDA graph can capture it, with one exception: what depends on the plan or on the learning rates alone is
// uploaded when it is first needed and kept.
#include "op_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cmath>

namespace defgan {

std::string cuda_toolkit() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

namespace {

using cuda::Precision;

// --- one call ---------------------------------------------------------------------------------------------

// Reads the extreme values back, and so waits for the device.
void check_values(const Tensor& images, const Tensor& start, const Plan& plan) {
  TORCH_CHECK(!capturing(), "validate=True reads values back, which a CUDA graph cannot capture: use validate=False");
  if (images.numel() == 0) return;
  const auto [low, high] = at::aminmax(images);  // both are NaN where any element is
  const auto [start_low, start_high] = at::aminmax(start);
  const Tensor found = at::stack({low, high, start_low, start_high}).cpu();
  const float* v = found.const_data_ptr<float>();
  check_range(plan, std::isfinite(v[0]) && std::isfinite(v[1]), v[0], v[1]);
  TORCH_CHECK_VALUE(std::isfinite(v[2]) && std::isfinite(v[3]), "z0 must be finite");
}

void check_errors(const Tensor& errors, const std::string& precision) {
  const int64_t bad = at::isfinite(errors).logical_not().sum().item<int64_t>();
  TORCH_CHECK_VALUE(bad == 0, "errors must be finite under validate=True, got ", bad, " of ", errors.numel(),
                    " rows that overflowed in ", precision, ": use a smaller lr",
                    precision == "float32" ? "" : " or precision=\"float32\"");
}

// keep: for the projection that drops rows and tells each row's steps; nullptr for the one that keeps all.
std::tuple<Tensor, Tensor, Tensor> projected_cuda(const Tensor& images, const Tensor& z0, at::TensorList parameters,
                                                  const std::string& description, at::ArrayRef<double> lr_schedule,
                                                  double momentum, const std::string& precision, int64_t max_rows,
                                                  bool validate, double radius, const std::vector<Keep>* keep) {
  return translated([&]() -> std::tuple<Tensor, Tensor, Tensor> {
    const std::shared_ptr<const Compiled> c = compiled(description, parameters, cuda::precision_of(precision));
    check_projection(c->plan, images, z0, max_rows);
    check_radius(radius);
    const c10::cuda::CUDAGuard guard(images.device());
    const int64_t count = images.size(0), restarts = z0.size(-2), k = c->plan.latent_size();
    const Tensor targets = images.to(at::kFloat).contiguous(), start = z0.to(at::kFloat).contiguous();
    if (validate) check_values(targets, start, c->plan);
    const Parameters own(parameters, images.device());
    Tensor latents = at::empty({count, restarts, k}, targets.options());
    Tensor errors = at::empty({count, restarts}, targets.options());
    Tensor steps;
    if (keep) steps = at::empty({count, restarts}, targets.options().dtype(at::kLong));
    if (count == 0) return {latents, errors, steps};

    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const Tensor tables = read_on(device_tables(c, images.device()), stream);
    const Tensor rates = read_on(device_rates(lr_schedule, images.device()), stream);
    cuda::ProjectArgs args{};
    args.images = targets.const_data_ptr<float>();
    args.start = start.const_data_ptr<float>();
    args.start_per_image = z0.dim() == 3;
    args.images_count = count;
    args.restarts = int(restarts);
    args.descent.rates = static_cast<const float*>(rates.const_data_ptr());
    args.descent.steps = int(lr_schedule.size());
    args.descent.momentum = float(momentum);
    args.descent.radius = float(radius);
    args.latents = latents.mutable_data_ptr<float>();
    args.errors = errors.mutable_data_ptr<float>();
    const cuda::Device device = properties_of(images.device());
    const cuda::Mapping mapping = cuda::wanted_mapping();
    Tensor working;
    if (keep) {
      const auto schedule = cuda::schedule_keeping(*c->program, device, count, args.restarts, args.descent.steps, *keep,
                                                   max_rows, mapping);
      working = workspace(schedule.workspace_bytes, targets);
      args.workspace = working.mutable_data_ptr();
      cuda::project_keeping(*c->program, tables.const_data_ptr(), own.views, schedule, args,
                            steps.mutable_data_ptr<int64_t>(), stream.stream());
    } else {
      const auto schedule = cuda::schedule_projection(*c->program, device, count * restarts, max_rows, mapping);
      working = workspace(schedule.workspace_bytes, targets);
      args.workspace = working.mutable_data_ptr();
      cuda::project(*c->program, tables.const_data_ptr(), own.views, schedule, args, stream.stream());
    }
    if (validate) check_errors(errors, precision);
    return {latents, errors, steps};
  });
}

std::tuple<Tensor, Tensor> project_cuda(const Tensor& images, const Tensor& z0, at::TensorList parameters,
                                        const std::string& description, at::ArrayRef<double> lr_schedule,
                                        double momentum, const std::string& precision, int64_t max_rows, bool validate,
                                        double radius) {
  auto [latents, errors, steps] = projected_cuda(images, z0, parameters, description, lr_schedule, momentum, precision,
                                                 max_rows, validate, radius, nullptr);
  return {latents, errors};
}

std::tuple<Tensor, Tensor, Tensor> project_keeping_cuda(const Tensor& images, const Tensor& z0,
                                                        at::TensorList parameters, const std::string& description,
                                                        at::ArrayRef<double> lr_schedule, double momentum,
                                                        const std::string& precision, int64_t max_rows, bool validate,
                                                        double radius, at::IntArrayRef keep_steps,
                                                        at::IntArrayRef keep_rows) {
  const std::vector<Keep> keep = checked_keep(keep_steps, keep_rows, int64_t(lr_schedule.size()));
  return projected_cuda(images, z0, parameters, description, lr_schedule, momentum, precision, max_rows, validate,
                        radius, &keep);
}

Tensor decode_cuda(const Tensor& latents, at::TensorList parameters, const std::string& description, int64_t max_rows) {
  return translated([&] {
    const std::shared_ptr<const Compiled> c = compiled(description, parameters, Precision::kFloat32);
    check_decoding(c->plan, latents, max_rows);
    const c10::cuda::CUDAGuard guard(latents.device());
    const int64_t count = latents.size(0);
    const Tensor source = latents.to(at::kFloat).contiguous();
    const Parameters own(parameters, latents.device());
    Tensor images = at::empty({count, c->plan.image.c, c->plan.image.h, c->plan.image.w}, source.options());
    if (count == 0) return images;

    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const cuda::Schedule schedule =
        cuda::schedule_decoding(*c->program, properties_of(latents.device()), count, max_rows);
    const Tensor tables = read_on(device_tables(c, latents.device()), stream);
    const Tensor working = workspace(schedule.workspace_bytes, source);
    cuda::decode(*c->program, tables.const_data_ptr(), own.views, schedule, source.const_data_ptr<float>(), count,
                 working.mutable_data_ptr(), images.mutable_data_ptr<float>(), stream.stream());
    return images;
  });
}

}  // namespace
}  // namespace defgan

TORCH_LIBRARY_IMPL(defgan_fast, CUDA, m) {
  m.impl("project", &defgan::project_cuda);
  m.impl("project_keeping", &defgan::project_keeping_cuda);
  m.impl("decode", &defgan::decode_cuda);
}
