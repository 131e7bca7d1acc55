// The CUDA kernels on the CPU, behind a C interface that tests load: the same host code (enqueue.cpp) and the same
// kernel sources, each thread a fiber of the executor (execution/). Not part of the extension.
#include <cstdlib>
#include <cstring>
#include <exception>

#include "../params.h"
#include "../nearest_search.h"
#include "../queue.h"
#include "driver_kernels.h"
#include "launch.h"

namespace {

using namespace defgan;
using namespace defgan::cuda;

class CpuQueue : public Queue {
 public:
  CpuQueue(execution::Memory& memory, uint64_t seed) : memory_(memory) { options_.seed = seed; }
  void launch(const KernelLaunch& l) override {
    execution::launch(
        memory_, l.blocks, l.threads, l.shared_bytes, l.cooperative,
        [&] {
          if (is_nearest(l.kernel))
            run_nearest(l);
          else if (l.kernel == KernelId::kKeep)
            run_keep(l);
          else if (l.precision == Precision::kFloat32)
            run_float32(l);
          else if (l.precision == Precision::kFloat16)
            run_float16(l);
          else
            run_bfloat16(l);
        },
        options_);
  }
  void clear(void* data, size_t bytes) override {
    std::memset(data, 0, bytes);
    memory_.mark_initialised(data, bytes);
  }

 private:
  execution::Memory& memory_;
  execution::Options options_;
};

thread_local std::string last_error;

template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

struct Buffer {
  explicit Buffer(size_t bytes) : size((bytes + 255) / 256 * 256), data(std::aligned_alloc(256, size ? size : 256)) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  size_t size;
  void* data;
};

// A generator on the "device": plan, parameters, tables.
struct Generator {
  Generator(const char* text, int precision, const float* const* data, const int64_t* elements, int count)
      : plan(parse_plan(text)) {
    std::vector<int64_t> sizes(elements, elements + count);
    program = make_program(plan, sizes, Precision(precision));
    tables = std::make_unique<Buffer>(tables_of(*program).size());
    std::memcpy(tables->data, tables_of(*program).data(), tables_of(*program).size());
    memory.add("tables", static_cast<const void*>(tables->data), tables_of(*program).size());
    for (int i = 0; i < count; ++i) {
      parameters.push_back({data[i], elements[i]});
      memory.add("parameter " + std::to_string(i), static_cast<const void*>(data[i]), size_t(elements[i]) * 4);
    }
  }
  Plan plan;
  std::shared_ptr<const Program> program;
  std::unique_ptr<Buffer> tables;
  std::vector<Parameter> parameters;
  execution::Memory memory;
};

// blocks: multiprocessors of the pretended device.
Device pretended_device(int blocks) { return {9, 0, blocks, size_t(227) << 10}; }

}  // namespace

extern "C" {

const char* defgan_error() { return last_error.c_str(); }

// precision: 0 float32, 1 float16, 2 bfloat16; mapping as in enqueue.h. seed 0: threads in order. Shapes as in
// enqueue.h's ProjectArgs, all in host memory. schedule[3], out: mapping, teams, blocks of a team; of the first leg.
// keep_count: of pairs of keep_steps and keep_rows, whose projection also tells how many steps each row took; -1: none,
// and `taken` is not written.
int defgan_project(const char* plan, int precision, const float* const* parameters, const int64_t* elements,
                   int parameter_count, const float* images, const float* start, int start_per_image,
                   int64_t images_count, int restarts, const float* rates, int steps, float momentum, float radius,
                   int keep_count, const int64_t* keep_steps, const int64_t* keep_rows, int mapping, int blocks,
                   int64_t max_rows, uint64_t seed, float* latents, float* errors, int64_t* taken, int* schedule) {
  return guarded([&] {
    Generator g(plan, precision, parameters, elements, parameter_count);
    const int64_t rows = images_count * restarts, k = g.plan.latent_size();
    std::vector<Keep> keep;
    for (int i = 0; i < keep_count; ++i) keep.push_back({keep_steps[i], keep_rows[i]});
    const KeepingSchedule keeping = schedule_keeping(*g.program, pretended_device(blocks), images_count, restarts,
                                                     steps, keep, max_rows, Mapping(mapping));
    const Schedule& s = keeping.schedules.front();
    schedule[0] = int(s.mapping);
    schedule[1] = s.teams;
    schedule[2] = s.blocks_per_team;
    Buffer workspace(keep_count < 0 ? s.workspace_bytes : keeping.workspace_bytes);
    g.memory.add("workspace", workspace.data, workspace.size, false);
    g.memory.add("images", static_cast<const void*>(images), size_t(images_count * g.plan.image.elements()) * 4);
    g.memory.add("start", static_cast<const void*>(start), size_t(k) * 4 * size_t(start_per_image ? rows : restarts));
    g.memory.add("rates", static_cast<const void*>(rates), size_t(steps) * 4);
    g.memory.add("latents", latents, size_t(rows * k) * 4, false);
    g.memory.add("errors", errors, size_t(rows) * 4, false);
    g.memory.add("steps", taken, size_t(rows) * 8, false);
    ProjectArgs args{};
    args.images = images;
    args.start = start;
    args.start_per_image = start_per_image;
    args.images_count = images_count;
    args.restarts = restarts;
    args.descent.rates = rates;
    args.descent.steps = steps;
    args.descent.momentum = momentum;
    args.descent.radius = radius;
    args.workspace = workspace.data;
    args.latents = latents;
    args.errors = errors;
    CpuQueue queue(g.memory, seed);
    if (keep_count < 0)
      project(queue, *g.program, g.tables->data, g.parameters, s, args);
    else
      project_keeping(queue, *g.program, g.tables->data, g.parameters, keeping, args, taken);
  });
}

int defgan_decode(const char* plan, int precision, const float* const* parameters, const int64_t* elements,
                  int parameter_count, const float* latents, int64_t count, int blocks, int64_t max_rows, uint64_t seed,
                  float* images) {
  return guarded([&] {
    Generator g(plan, precision, parameters, elements, parameter_count);
    const Schedule s = schedule_decoding(*g.program, pretended_device(blocks), count, max_rows);
    Buffer workspace(s.workspace_bytes);
    g.memory.add("workspace", workspace.data, workspace.size, false);
    g.memory.add("latents", static_cast<const void*>(latents), size_t(count * g.plan.latent_size()) * 4);
    g.memory.add("images", images, size_t(count * g.plan.image.elements()) * 4, false);
    CpuQueue queue(g.memory, seed);
    decode(queue, *g.program, g.tables->data, g.parameters, s, latents, count, workspace.data, images);
  });
}

// Calls of one search on one "device": what is kept lives from one to the next. `kept` and `valid` are the caller's;
// kept_bytes, out, tells how large `kept` must be, and nothing runs where `kept` is null.
int defgan_nearest(const char* plan, const float* const* parameters, const int64_t* elements, int parameter_count,
                   const float* candidates, int64_t count, const float* images, const int64_t* draws,
                   int64_t images_count, int64_t restarts, int blocks, uint64_t seed, void* kept, uint32_t* valid,
                   int64_t* kept_bytes, int64_t* indices) {
  return guarded([&] {
    Generator g(plan, int(Precision::kFloat32), parameters, elements, parameter_count);
    const Device device = pretended_device(blocks);
    const SearchSizes sizes = search_sizes(*g.program, g.parameters, device, count, images_count);
    *kept_bytes = int64_t(sizes.kept_bytes);
    if (kept == nullptr) return;
    Buffer workspace(sizes.workspace_bytes);
    g.memory.add("workspace", workspace.data, workspace.size, false);
    g.memory.add("kept", kept, sizes.kept_bytes, *valid != 0);
    g.memory.add("valid", valid, 4, true);
    g.memory.add("candidates", static_cast<const void*>(candidates), size_t(count * g.plan.latent_size()) * 4);
    g.memory.add("images", static_cast<const void*>(images), size_t(images_count * g.plan.image.elements()) * 4);
    if (draws) g.memory.add("draws", static_cast<const void*>(draws), size_t(images_count) * 8);
    g.memory.add("indices", indices, size_t(images_count * restarts) * 8, false);
    CpuQueue queue(g.memory, seed);
    find_nearest(queue, *g.program, g.tables->data, g.parameters, device,
                 {candidates, count, images, draws, images_count, restarts, kept, valid, workspace.data, indices});
  });
}
}
