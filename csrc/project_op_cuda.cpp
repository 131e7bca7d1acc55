// The GPU's half of the torch ops; compiled only where the CUDA kernels are. A call checks its arguments, takes one
// block of working memory from torch's allocator and enqueues kernels on the current stream. It waits for nothing,
// so a CUDA graph can capture it, with one exception: what depends on the plan or on the learning rates alone is
// uploaded when it is first needed and kept.
#include <ATen/ATen.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cmath>
#include <list>
#include <map>
#include <mutex>

#include "cuda_options.h"
#include "project_checks.h"

namespace defgan {

std::string cuda_toolkit() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

namespace {

using cuda::Precision;
using cuda::Program;

bool capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

// --- what is made once and kept ---------------------------------------------------------------------------

// The most recently used values by key. Entries that a captured graph reads stay for ever: it holds their addresses.
// Neither the values nor the mutex are ever destroyed, since at exit CUDA may be gone before they are.
template <class Key, class Value>
class Kept {
 public:
  explicit Kept(size_t most) : most_(most) {}

  template <class Make>
  Value get(const Key& key, bool for_graph, const Make& make) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = entries_.begin(); it != entries_.end(); ++it)
      if (it->key == key) {
        it->pinned |= for_graph;
        entries_.splice(entries_.begin(), entries_, it);
        return it->value;
      }
    Value value = make();
    entries_.push_front({key, value, for_graph});
    size_t loose = 0;
    for (auto it = entries_.begin(); it != entries_.end();)
      it = !it->pinned && ++loose > most_ ? entries_.erase(it) : std::next(it);
    return value;
  }

 private:
  struct Entry {
    Key key;
    Value value;
    bool pinned;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;
  size_t most_;
};

constexpr size_t kPrograms = 32, kSchedules = 64;

// A plan compiled for one precision and for parameters of these sizes.
struct Compiled {
  Plan plan;
  std::shared_ptr<const Program> program;
};
using CompiledKey = std::tuple<std::string, std::vector<int64_t>, Precision>;

std::shared_ptr<const Compiled> compiled(const std::string& description, at::TensorList parameters,
                                         Precision precision) {
  static auto& kept = *new Kept<CompiledKey, std::shared_ptr<const Compiled>>(kPrograms);
  std::vector<int64_t> elements;
  for (const Tensor& p : parameters) elements.push_back(p.numel());
  return kept.get({description, elements, precision}, false, [&] {
    auto made = std::make_shared<Compiled>();
    made->plan = parse_plan(description);
    made->program = cuda::make_program(made->plan, elements, precision);
    return made;
  });
}

// A copy on the current device. Every stream can read it: the copy is complete when this returns.
Tensor upload(const void* data, size_t bytes, const at::Device& device) {
  TORCH_CHECK(!capturing(),
              "the first call with a generator's plan, a precision or a learning-rate schedule uploads tables, which a "
              "CUDA graph cannot capture: make one such call on ",
              device.str(), " before the capture");
  return at::from_blob(const_cast<void*>(data), {int64_t(bytes)}, at::kByte).to(device);
}

// A kept tensor was made on another stream than the one that reads it now: its memory must outlive the reading.
Tensor read_on(const Tensor& kept, const c10::cuda::CUDAStream& stream) {
  if (!capturing()) c10::cuda::CUDACachingAllocator::recordStream(kept.storage().data_ptr(), stream);
  return kept;
}

Tensor device_tables(const std::shared_ptr<const Compiled>& compiled, const at::Device& device) {
  // The key owns the program, so that no other one can take its address.
  static auto& kept = *new Kept<std::pair<std::shared_ptr<const Compiled>, at::Device>, Tensor>(kPrograms);
  return kept.get({compiled, device}, capturing(), [&] {
    const std::vector<char>& tables = cuda::tables_of(*compiled->program);
    return upload(tables.data(), tables.size(), device);
  });
}

Tensor device_rates(at::ArrayRef<double> lr_schedule, const at::Device& device) {
  static auto& kept = *new Kept<std::pair<std::vector<float>, at::Device>, Tensor>(kSchedules);
  const std::vector<float> rates(lr_schedule.begin(), lr_schedule.end());
  return kept.get({rates, device}, capturing(), [&] { return upload(rates.data(), rates.size() * 4, device); });
}

// Asking the driver takes longer than a launch.
cuda::Device properties_of(const at::Device& device) {
  static std::mutex mutex;
  static std::map<int, cuda::Device> known;
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device.index());
  return found != known.end() ? found->second : known.emplace(device.index(), cuda::current_device()).first->second;
}

// --- one call ---------------------------------------------------------------------------------------------

// The parameters in float32, and the tensors that own them.
struct Parameters {
  Parameters(at::TensorList parameters, const at::Device& device) {
    for (const Tensor& p : parameters) {
      held.push_back(checked_parameter(p, device));
      views.push_back({held.back().const_data_ptr<float>(), held.back().numel()});
    }
  }
  std::vector<Tensor> held;
  std::vector<cuda::Parameter> views;
};

Tensor workspace(const cuda::Schedule& schedule, const Tensor& like) {
  return at::empty({int64_t(schedule.workspace_bytes)}, like.options().dtype(at::kByte));
}

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

std::tuple<Tensor, Tensor> project_cuda(const Tensor& images, const Tensor& z0, at::TensorList parameters,
                                        const std::string& description, at::ArrayRef<double> lr_schedule,
                                        double momentum, const std::string& precision, int64_t max_rows,
                                        bool validate) {
  return translated([&]() -> std::tuple<Tensor, Tensor> {
    const std::shared_ptr<const Compiled> c = compiled(description, parameters, cuda::precision_of(precision));
    check_projection(c->plan, images, z0, max_rows);
    const c10::cuda::CUDAGuard guard(images.device());
    const int64_t count = images.size(0), restarts = z0.size(-2), k = c->plan.latent_size();
    const Tensor targets = images.to(at::kFloat).contiguous(), start = z0.to(at::kFloat).contiguous();
    if (validate) check_values(targets, start, c->plan);
    const Parameters own(parameters, images.device());
    Tensor latents = at::empty({count, restarts, k}, targets.options());
    Tensor errors = at::empty({count, restarts}, targets.options());
    if (count == 0) return {latents, errors};

    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const cuda::Schedule schedule = cuda::schedule_projection(*c->program, properties_of(images.device()),
                                                              count * restarts, max_rows, cuda::wanted_mapping());
    const Tensor tables = read_on(device_tables(c, images.device()), stream);
    const Tensor rates = read_on(device_rates(lr_schedule, images.device()), stream);
    const Tensor working = workspace(schedule, targets);
    cuda::ProjectArgs args{};
    args.images = targets.const_data_ptr<float>();
    args.start = start.const_data_ptr<float>();
    args.start_per_image = z0.dim() == 3;
    args.images_count = count;
    args.restarts = int(restarts);
    args.rates = static_cast<const float*>(rates.const_data_ptr());
    args.steps = int(lr_schedule.size());
    args.momentum = float(momentum);
    args.workspace = working.mutable_data_ptr();
    args.latents = latents.mutable_data_ptr<float>();
    args.errors = errors.mutable_data_ptr<float>();
    cuda::project(*c->program, tables.const_data_ptr(), own.views, schedule, args, stream.stream());
    if (validate) check_errors(errors, precision);
    return {latents, errors};
  });
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
    const Tensor working = workspace(schedule, source);
    cuda::decode(*c->program, tables.const_data_ptr(), own.views, schedule, source.const_data_ptr<float>(), count,
                 working.mutable_data_ptr(), images.mutable_data_ptr<float>(), stream.stream());
    return images;
  });
}

}  // namespace
}  // namespace defgan

TORCH_LIBRARY_IMPL(defgan_fast, CUDA, m) {
  m.impl("project", &defgan::project_cuda);
  m.impl("decode", &defgan::decode_cuda);
}
