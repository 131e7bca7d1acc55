// The torch ops over the kernels: schema, fake kernels, the CPU's half with its cache of packed weights; and the
// pybind11 module for what is not a tensor. project_op_cuda.cpp has the GPU's half. Only the files project_*
// include torch.
#include <ATen/ATen.h>
#include <pthread.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <mutex>

#include "cpu/content_hash.h"
#include "cpu/keeping.h"
#include "cpu/limits.h"
#include "cpu/projection.h"
#include "cpu/team.h"
#include "cuda_options.h"
#include "geometry.h"
#include "project_checks.h"
#include "project_pool.h"
#include "project_signals.h"

namespace defgan {
namespace {

using cpu::PackedGenerator;
using cpu::Precision;

// --- checks of the CPU's half; the rest is in project_checks.h --------------------------------------------

Precision precision_of(const std::string& precision) {
  if (precision == "float32") return Precision::kFloat32;
  TORCH_CHECK_VALUE(precision != "float16",
                    "precision must be \"float32\" or \"bfloat16\" on the CPU, got \"float16\": use \"bfloat16\"");
  TORCH_CHECK_VALUE(precision == "bfloat16", "precision must be \"float32\" or \"bfloat16\" on the CPU, got \"",
                    precision, "\"");
  return Precision::kBfloat16;
}

void check_values(const float* images, int64_t count, const Plan& plan) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(images[i]);
    low = std::min(low, images[i]);
    high = std::max(high, images[i]);
  }
  if (count) check_range(plan, finite, low, high);
}

// --- packed weights, cached by content --------------------------------------------------------------------

struct CacheEntry {
  std::string plan;
  const cpu::InstructionSet* set;
  Precision precision;
  cpu::Hash hash;
  std::shared_ptr<const PackedGenerator> packed;
};
constexpr size_t kCacheEntries = 16, kCacheBytes = size_t(512) << 20;

std::mutex cache_mutex;
std::list<CacheEntry> cache;  // most recently used first

// Nobody may hold the mutex across a fork, or the child (a DataLoader's worker) would wait for it for ever.
const int whole_across_fork =
    pthread_atfork([] { cache_mutex.lock(); }, [] { cache_mutex.unlock(); }, [] { cache_mutex.unlock(); });

std::shared_ptr<const PackedGenerator> packed_generator(const std::string& description, const Plan& plan,
                                                        at::TensorList parameters, Precision precision) {
  std::vector<Tensor> held;
  std::vector<cpu::Parameter> views;
  for (const Tensor& p : parameters) {
    held.push_back(checked_parameter(p, at::kCPU));
    views.push_back({held.back().const_data_ptr<float>(), held.back().numel()});
  }
  const cpu::Hash hash = cpu::hash_of(views, usable_threads());
  const cpu::InstructionSet& set = cpu::active_instruction_set();
  {
    std::lock_guard<std::mutex> lock(cache_mutex);
    for (auto it = cache.begin(); it != cache.end(); ++it)
      if (it->hash == hash && it->set == &set && it->plan == description) {
        // What is packed in bfloat16 comes with the same in float32.
        const bool exact = precision == Precision::kFloat32 && it->packed->exact;
        if (it->precision != precision && !exact) continue;
        cache.splice(cache.begin(), cache, it);
        return exact ? it->packed->exact : it->packed;
      }
  }
  std::shared_ptr<const PackedGenerator> packed = cpu::pack(plan, views, set, precision);
  std::lock_guard<std::mutex> lock(cache_mutex);
  cache.push_front({description, &set, precision, hash, packed});
  size_t bytes = 0, kept = 0;
  for (auto it = cache.begin(); it != cache.end();) {
    bytes += it->packed->bytes();
    ++kept;
    it = kept > 1 && (kept > kCacheEntries || bytes > kCacheBytes) ? cache.erase(it) : std::next(it);
  }
  return packed;
}

// --- the ops ----------------------------------------------------------------------------------------------

// steps: of each row, for the projection that keeps some of them; an undefined tensor for the one that keeps all.
std::tuple<Tensor, Tensor, Tensor> projected_cpu(const Tensor& images, const Tensor& z0, at::TensorList parameters,
                                                 const std::string& description, at::ArrayRef<double> lr_schedule,
                                                 double momentum, const std::string& precision, int64_t max_rows,
                                                 bool validate, double radius, const std::vector<Keep>* keep) {
  const Plan plan = plan_of(description);
  check_projection(plan, images, z0, max_rows);
  check_radius(radius);
  const Precision p = precision_of(precision);
  const int64_t count = images.size(0), restarts = z0.size(-2), k = plan.latent_size();

  const Tensor targets = images.to(at::kFloat).contiguous(), start = z0.to(at::kFloat).contiguous();
  if (validate) {
    check_values(targets.const_data_ptr<float>(), targets.numel(), plan);
    const float* z = start.const_data_ptr<float>();
    for (int64_t i = 0; i < start.numel(); ++i) TORCH_CHECK_VALUE(std::isfinite(z[i]), "z0 must be finite");
  }
  Tensor latents = at::empty({count, restarts, k}, targets.options());
  Tensor errors = at::empty({count, restarts}, targets.options());
  Tensor steps;
  if (keep) steps = at::empty({count, restarts}, targets.options().dtype(at::kLong));
  if (count == 0) return {latents, errors, steps};
  const std::vector<float> rates(lr_schedule.begin(), lr_schedule.end());
  translated([&] {
    const auto packed = packed_generator(description, plan, parameters, p);
    cpu::ProjectArgs args{};
    args.images = targets.const_data_ptr<float>();
    args.start = start.const_data_ptr<float>();
    args.start_per_image = z0.dim() == 3;
    args.images_count = count;
    args.restarts = int(restarts);
    args.descent.rates = rates.data();
    args.descent.steps = int(rates.size());
    args.descent.momentum = float(momentum);
    args.descent.radius = float(radius);
    args.threads = usable_threads();
    args.max_rows = max_rows;
    args.latents = latents.mutable_data_ptr<float>();
    args.errors = errors.mutable_data_ptr<float>();
    if (keep)
      cpu::project_keeping(*packed, args, *keep, steps.mutable_data_ptr<int64_t>());
    else
      cpu::project(*packed, args);
  });
  return {latents, errors, steps};
}

std::tuple<Tensor, Tensor> project_cpu(const Tensor& images, const Tensor& z0, at::TensorList parameters,
                                       const std::string& description, at::ArrayRef<double> lr_schedule,
                                       double momentum, const std::string& precision, int64_t max_rows, bool validate,
                                       double radius) {
  auto [latents, errors, steps] = projected_cpu(images, z0, parameters, description, lr_schedule, momentum, precision,
                                                max_rows, validate, radius, nullptr);
  return {latents, errors};
}

std::tuple<Tensor, Tensor, Tensor> project_keeping_cpu(const Tensor& images, const Tensor& z0,
                                                       at::TensorList parameters, const std::string& description,
                                                       at::ArrayRef<double> lr_schedule, double momentum,
                                                       const std::string& precision, int64_t max_rows, bool validate,
                                                       double radius, at::IntArrayRef keep_steps,
                                                       at::IntArrayRef keep_rows) {
  const std::vector<Keep> keep = checked_keep(keep_steps, keep_rows, int64_t(lr_schedule.size()));
  return projected_cpu(images, z0, parameters, description, lr_schedule, momentum, precision, max_rows, validate,
                       radius, &keep);
}

Tensor decode_cpu(const Tensor& latents, at::TensorList parameters, const std::string& description, int64_t max_rows) {
  const Plan plan = plan_of(description);
  check_decoding(plan, latents, max_rows);
  const Tensor source = latents.to(at::kFloat).contiguous();
  Tensor images = at::empty({latents.size(0), plan.image.c, plan.image.h, plan.image.w}, source.options());
  translated([&] {
    const auto packed = packed_generator(description, plan, parameters, Precision::kFloat32);
    cpu::decode(*packed, source.const_data_ptr<float>(), latents.size(0), usable_threads(), max_rows,
                images.mutable_data_ptr<float>());
  });
  return images;
}

// Fake kernels: shapes only, symbolic ones included.
std::tuple<Tensor, Tensor> project_meta(const Tensor& images, const Tensor& z0, at::TensorList, const std::string&,
                                        at::ArrayRef<double>, double, const std::string&, int64_t, bool, double) {
  const auto options = images.options().dtype(at::kFloat);
  return {at::empty_symint({images.sym_size(0), z0.sym_size(-2), z0.sym_size(-1)}, options),
          at::empty_symint({images.sym_size(0), z0.sym_size(-2)}, options)};
}

std::tuple<Tensor, Tensor, Tensor> project_keeping_meta(const Tensor& images, const Tensor& z0, at::TensorList p,
                                                        const std::string& plan, at::ArrayRef<double> rates,
                                                        double momentum, const std::string& precision, int64_t max_rows,
                                                        bool validate, double radius, at::IntArrayRef,
                                                        at::IntArrayRef) {
  auto [latents, errors] = project_meta(images, z0, p, plan, rates, momentum, precision, max_rows, validate, radius);
  return {latents, errors, at::empty_symint(errors.sym_sizes(), errors.options().dtype(at::kLong))};
}

Tensor decode_meta(const Tensor& latents, at::TensorList, const std::string& description, int64_t) {
  const Plan plan = plan_of(description);
  return at::empty_symint({latents.sym_size(0), plan.image.c, plan.image.h, plan.image.w},
                          latents.options().dtype(at::kFloat));
}

}  // namespace
}  // namespace defgan

TORCH_LIBRARY(defgan_fast, m) {
  // images [B, C, H, W], z0 [R, k] or [B, R, k], parameters as the plan numbers them -> latents [B, R, k] and
  // errors [B, R], float32. max_rows 0: automatic. radius 0: latents are free, else they are scaled to that norm.
  m.def(
      "project(Tensor images, Tensor z0, Tensor[] parameters, str plan, float[] lr_schedule, float momentum, "
      "str precision, int max_rows, bool validate, float radius=0.) -> (Tensor latents, Tensor errors)",
      {at::Tag::pt2_compliant_tag});
  // The same, but after keep_steps[i] steps only the keep_rows[i] rows of least error of each image go on; also how many
  // steps each row took, [B, R] int64.
  m.def(
      "project_keeping(Tensor images, Tensor z0, Tensor[] parameters, str plan, float[] lr_schedule, float momentum, "
      "str precision, int max_rows, bool validate, float radius, int[] keep_steps, int[] keep_rows) -> "
      "(Tensor latents, Tensor errors, Tensor steps)",
      {at::Tag::pt2_compliant_tag});
  // latents [B, k] -> images [B, C, H, W], float32.
  m.def("decode(Tensor latents, Tensor[] parameters, str plan, int max_rows) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(defgan_fast, CPU, m) {
  m.impl("project", &defgan::project_cpu);
  m.impl("project_keeping", &defgan::project_keeping_cpu);
  m.impl("decode", &defgan::decode_cpu);
}
TORCH_LIBRARY_IMPL(defgan_fast, Meta, m) {
  m.impl("project", &defgan::project_meta);
  m.impl("project_keeping", &defgan::project_keeping_meta);
  m.impl("decode", &defgan::decode_meta);
}
// They have no derivative of their own and say so on backward: gradient modes are operators in
// defgan_fast/gradients.py.
TORCH_LIBRARY_IMPL(defgan_fast, Autograd, m) {
  m.impl("project", torch::autograd::autogradNotImplementedFallback());
  m.impl("project_keeping", torch::autograd::autogradNotImplementedFallback());
  m.impl("decode", torch::autograd::autogradNotImplementedFallback());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  m.doc() = "Compiled half of defgan_fast: registers torch.ops.defgan_fast, and tells what is no tensor.";
  defgan::lend_torch_threads();
  defgan::hear_python_signals();
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["torch"] = TORCH_VERSION;
#ifdef DEFGAN_WITH_CUDA
    info["cuda"] = "yes";
    info["cuda_toolkit"] = defgan::cuda_toolkit();
#else
    info["cuda"] = "no";
#endif
    return info;
  });
  m.def("instruction_sets", &defgan::cpu::supported_instruction_sets);
  m.def("active_instruction_set", [] { return std::string(defgan::cpu::active_instruction_set().name); });
  m.def("usable_threads", &defgan::usable_threads);
  m.def("thread_counts", [] {
    const defgan::cpu::ThreadCounts counts = defgan::cpu::thread_counts();
    py::dict d;
    d["busy"] = counts.busy;
    d["most"] = counts.most;
    d["yields"] = counts.yields;
    return d;
  });
  m.def(
      "machine_limits",
      [](const std::string& isa, const std::string& precision, int threads, double seconds) {
        if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
        const auto p = precision == "bfloat16" ? defgan::cpu::Precision::kBfloat16 : defgan::cpu::Precision::kFloat32;
        return defgan::cpu::multiply_add_limit(defgan::cpu::instruction_set(isa), p, threads, seconds);
      },
      py::arg("isa"), py::arg("precision"), py::arg("threads"), py::arg("seconds"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_schedule",
      [](const std::string& plan, const std::vector<int64_t>& elements, const std::string& precision,
         std::pair<int, int> capability, int multiprocessors, size_t shared_memory, int64_t rows, int64_t max_rows,
         const std::string& mapping) {
        namespace cuda = defgan::cuda;
        const auto program = cuda::make_program(defgan::parse_plan(plan), elements, cuda::precision_of(precision));
        const cuda::Device device{capability.first, capability.second, multiprocessors, shared_memory};
        const cuda::Schedule s = cuda::schedule_projection(*program, device, rows, max_rows, cuda::mapping_of(mapping));
        py::dict d;
        d["mapping"] = cuda::name_of(s.mapping);
        d["rows_in_flight"] = s.rows_in_flight;
        d["teams"] = s.teams;
        d["blocks_per_team"] = s.blocks_per_team;
        d["workspace_bytes"] = s.workspace_bytes;
        d["reason"] = s.reason;
        return d;
      },
      py::arg("plan"), py::arg("elements"), py::arg("precision"), py::kw_only(), py::arg("capability"),
      py::arg("multiprocessors"), py::arg("shared_memory"), py::arg("rows"), py::arg("max_rows") = 0,
      py::arg("mapping") = "auto");
  m.def("flop_per_step", [](const std::string& plan) { return defgan::flop_per_step(defgan::parse_plan(plan)); });
}
