// The projection on a GPU, as the binding sees it: a program made of a plan, the workspace it wants, and calls that
// only enqueue work on a stream. No torch here, and no CUDA headers either: device pointers are pointers, a stream is
// an opaque handle. Nothing below allocates device memory or synchronises, so calls can be captured in a CUDA graph.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../descent.h"
#include "../legs.h"
#include "../plan.h"

namespace defgan::cuda {

// Of activations and weights; sums, latents, velocities and the final error are float32 in all of them.
enum class Precision { kFloat32, kFloat16, kBfloat16 };

// Which mapping of the work runs the steps (docs/gpu.md). All that serve one plan and precision give the same bits.
enum class Mapping {
  kAuto,
  kFused,    // a block takes 8 rows through all steps, activations in shared memory; known geometries only
  kLayered,  // all blocks share every layer of all rows, with a barrier of the whole grid between layers
  // Teams of blocks, each with its own groups and its own barrier. kAuto never takes it, since a barrier of 6 blocks costs
  // what one of 132 does. It stays as the only mapping with several teams: by it the tests see that the bits do not
  // depend on how groups and tiles are divided, and that the barrier keeps teams apart.
  kSplit,
};

// What planning needs to know of a device.
struct Device {
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  size_t shared_memory = 0;  // bytes a block may ask for (opt-in)
};

// A plan compiled for one precision: its stages and their tables (host memory). Depends on the plan and on how many
// elements each parameter has (a norm may be per channel or per element), not on weights, rows or device. Immutable.
// Throws std::invalid_argument as check_parameters does.
class Program;
std::shared_ptr<const Program> make_program(const Plan& plan, const std::vector<int64_t>& elements,
                                            Precision precision);

// The tables that kernels read, as one blob: the caller keeps a copy in device memory, 256-byte aligned.
const std::vector<char>& tables_of(const Program& program);

// A parameter in device memory, float32, contiguous, in the order that the plan numbers them.
struct Parameter {
  const float* data;
  int64_t elements;
};

// How one call will be carried out; what `defgan-fast info` and tests look at.
struct Schedule {
  Mapping mapping = Mapping::kLayered;
  int64_t rows_in_flight = 0;  // per launch; more rows take several launches
  int teams = 0, blocks_per_team = 0;
  int64_t exact_rows_in_flight = 0;  // the same of the float32 pass that evaluates the errors, or decodes
  int exact_blocks = 0;
  size_t workspace_bytes = 0;  // packed weights and activations
  std::string reason;          // one clause: why this mapping
};

// Throws std::invalid_argument where `wanted` cannot run this program on this device.
// rows: B * R of the call. max_rows: rows in flight at most; 0: as many as keep working memory under 200 MB.
Schedule schedule_projection(const Program& program, const Device& device, int64_t rows, int64_t max_rows,
                             Mapping wanted);
Schedule schedule_decoding(const Program& program, const Device& device, int64_t rows, int64_t max_rows);

struct ProjectArgs {
  const float* images;      // device, [B, pixels]
  const float* start;       // device, latents [R, k] or [B, R, k]
  bool start_per_image;     // which of the two
  int64_t images_count;     // B
  int restarts;             // R
  Descent descent;          // its rates on the device
  const float* velocities;  // device, [B, R, k], with which the descent goes on; nullptr: it begins
  void* workspace;          // device, schedule.workspace_bytes, 256-byte aligned, contents arbitrary
  float* latents;           // device, out: [B, R, k]
  float* velocities_out;    // device, out: [B, R, k], or nullptr
  float* errors;            // device, out: [B, R], mean squared error after the last step, evaluated in float32
};

// Enqueues a projection. `tables`: device copy of tables_of(program). `stream`: a cudaStream_t.
// Throws std::runtime_error with CUDA's words where a launch is refused.
void project(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
             const Schedule& schedule, const ProjectArgs& args, void* stream);

// How a projection of which only some rows go on will be carried out: each of its legs as it suits its rows.
struct KeepingSchedule {
  std::vector<Leg> legs;
  std::vector<Schedule> schedules;  // of the legs
  size_t workspace_bytes = 0;
};
KeepingSchedule schedule_keeping(const Program& program, const Device& device, int64_t images, int restarts, int steps,
                                 const std::vector<Keep>& keep, int64_t max_rows, Mapping wanted);

// Enqueues it. steps: device, out, [B, R], how many steps each row took. A dropped row has the latent and the error with
// which it stopped. args.velocities and velocities_out must be nullptr.
void project_keeping(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                     const KeepingSchedule& schedule, const ProjectArgs& args, int64_t* steps, void* stream);

// images [count, pixels] = G(latents [count, k]), always in float32; all pointers on the device.
void decode(const Program& program, const void* tables, const std::vector<Parameter>& parameters,
            const Schedule& schedule, const float* latents, int64_t count, void* workspace, float* images,
            void* stream);

// The current device's properties.
Device current_device();

const char* name_of(Mapping mapping);

}  // namespace defgan::cuda
