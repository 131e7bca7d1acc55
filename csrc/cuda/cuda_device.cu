// The projection on the current CUDA device: enqueue.h's calls over a queue that is a stream.
#include "entries.cuh"
#include "nearest_search.h"
#include "params.h"

namespace defgan::cuda {
namespace {

class Stream : public Queue {
 public:
  explicit Stream(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  void launch(const KernelLaunch& l) override {
    if (l.kernel == KernelId::kKeep) return launch_keep(l, stream_);
    if (is_nearest(l.kernel)) return launch_nearest(l, stream_);
    switch (l.precision) {
      case Precision::kFloat32: return launch_as<float>(l);
      case Precision::kFloat16: return launch_as<Half>(l);
      case Precision::kBfloat16: return launch_as<Bfloat16>(l);
    }
  }
  void clear(void* data, size_t bytes) override {
    check(cudaMemsetAsync(data, 0, bytes, stream_), "clearing the barriers");
  }

 private:
  template <class S>
  void launch_as(const KernelLaunch& l) {
    switch (l.kernel) {
      case KernelId::kPack: return launch_pack<S>(l, stream_);
      case KernelId::kTeam: return launch_team<S>(l, stream_);
      case KernelId::kFused:
        if constexpr (!std::is_same_v<S, float>) launch_fused<S>(l, stream_);
        return;
      default: return;  // those of keep_rows.h and find_nearest.h have no precision
    }
  }

  cudaStream_t stream_;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for the device's properties");
  return value;
}

}  // namespace

Device current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  return {attribute(cudaDevAttrComputeCapabilityMajor, device), attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))};
}

void project(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
             const Schedule& schedule, const ProjectArgs& args, void* stream) {
  Stream queue(stream);
  project(queue, program, tables, parameters, schedule, args);
}

void project_keeping(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                     const KeepingSchedule& schedule, const ProjectArgs& args, int64_t* steps, void* stream) {
  Stream queue(stream);
  project_keeping(queue, program, tables, parameters, schedule, args, steps);
}

void decode(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
            const Schedule& schedule, const float* latents, int64_t count, void* workspace, float* images,
            void* stream) {
  Stream queue(stream);
  decode(queue, program, tables, parameters, schedule, latents, count, workspace, images);
}

void find_nearest(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                  const Device& device, const SearchArgs& args, void* stream) {
  Stream queue(stream);
  find_nearest(queue, program, tables, parameters, device, args);
}

}  // namespace defgan::cuda
