// A projection as a sequence of kernel launches, written against an abstract device: the CUDA one (cuda_device.cu) or
// the CPU execution (execution/driver.cpp). So the whole path from a call's arguments to the last error is tested
// without a GPU.
#pragma once

#include "program.h"

namespace defgan::cuda {

enum class KernelId {
  kPack,
  kTeam,
  kFused,
  kKeep,  // of keep_rows.h
  // of find_nearest.h
  kCompareContent,
  kDecideStale,
  kCopyContent,
  kLargestPixel,
  kPackCandidates,
  kPackImages,
  kScore,
  kSelect,
};
inline bool is_nearest(KernelId kernel) { return kernel >= KernelId::kCompareContent; }

struct KernelLaunch {
  KernelId kernel;
  Precision precision;
  int geometry;  // of kFused: index into the list of fused geometries
  const void* params;
  int blocks, threads;
  size_t shared_bytes;
  bool cooperative;  // all blocks resident at once
};

class Queue {
 public:
  virtual ~Queue() = default;
  virtual void launch(const KernelLaunch& launch) = 0;
  virtual void clear(void* data, size_t bytes) = 0;  // to zero
};

void project(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
             const Schedule& schedule, const ProjectArgs& args);
void project_keeping(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                     const KeepingSchedule& schedule, const ProjectArgs& args, int64_t* steps);
// The two halves of `project`: weights are packed to the same places of the workspace whatever the schedule.
void pack_weights(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                  const Schedule& schedule, void* workspace);
void descend(Queue& queue, const Program& program, const void* tables, const Schedule& schedule,
             const ProjectArgs& args);
// wanted: on the device; where it is 0 when the kernels start, they leave images as they were. nullptr: always wanted.
void decode(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
            const Schedule& schedule, const float* latents, int64_t count, void* workspace, float* images,
            const uint32_t* wanted = nullptr);

}  // namespace defgan::cuda
