// What the GPU's halves of the ops share: what is made once and kept on a device, and a call's parameters and working
// memory. Includes torch; only in builds with CUDA.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <list>
#include <map>
#include <mutex>

#include "cuda_options.h"
#include "project_checks.h"

namespace defgan {

inline bool capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

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
  std::shared_ptr<const cuda::Program> program;
};
using CompiledKey = std::tuple<std::string, std::vector<int64_t>, cuda::Precision>;

inline std::shared_ptr<const Compiled> compiled(const std::string& description, at::TensorList parameters,
                                                cuda::Precision precision) {
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
inline Tensor upload(const void* data, size_t bytes, const at::Device& device) {
  TORCH_CHECK(!capturing(),
              "the first call with a generator's plan, a precision or a learning-rate schedule uploads tables, which a "
              "CUDA graph cannot capture: make one such call on ",
              device.str(), " before the capture");
  return at::from_blob(const_cast<void*>(data), {int64_t(bytes)}, at::kByte).to(device);
}

// A kept tensor was made on another stream than the one that reads it now: its memory must outlive the reading.
inline Tensor read_on(const Tensor& kept, const c10::cuda::CUDAStream& stream) {
  if (!capturing()) c10::cuda::CUDACachingAllocator::recordStream(kept.storage().data_ptr(), stream);
  return kept;
}

inline Tensor device_tables(const std::shared_ptr<const Compiled>& compiled, const at::Device& device) {
  // The key owns the program, so that no other one can take its address.
  static auto& kept = *new Kept<std::pair<std::shared_ptr<const Compiled>, at::Device>, Tensor>(kPrograms);
  return kept.get({compiled, device}, capturing(), [&] {
    const std::vector<char>& tables = cuda::tables_of(*compiled->program);
    return upload(tables.data(), tables.size(), device);
  });
}

inline Tensor device_rates(at::ArrayRef<double> lr_schedule, const at::Device& device) {
  static auto& kept = *new Kept<std::pair<std::vector<float>, at::Device>, Tensor>(kSchedules);
  const std::vector<float> rates(lr_schedule.begin(), lr_schedule.end());
  return kept.get({rates, device}, capturing(), [&] { return upload(rates.data(), rates.size() * 4, device); });
}

// Asking the driver takes longer than a launch.
inline cuda::Device properties_of(const at::Device& device) {
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

inline Tensor workspace(size_t bytes, const Tensor& like) {
  return at::empty({int64_t(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace defgan
