// A team of threads takes a group of rows through all steps, then the next group.
#include "projection.h"

#include <atomic>
#include <cstring>
#include <memory>

#include "division.h"
#include "float_control.h"
#include "passes.h"

namespace defgan::cpu {
namespace {

// A team of threads, and the group of rows that it has at hand.
struct Team {
  Workspace workspace;
  Barrier barrier;
  int64_t group = 0;
  // Whether an interruption ends the work. Members that asked by themselves would hear it at different steps and wait
  // for each other, so the first one decides for all; the others read it after a meeting that every step has anyway.
  bool stops = false;
  Team(const PackedGenerator& g, int rows, int size) : workspace(g, rows), barrier(size) {}
};

// One member's part in what its team does with a group of rows. All members call the same functions.
class Worker {
 public:
  Worker(const PackedGenerator& generator, Team& team, const Member& member, Interruption& interruption, bool asks,
         Profile* profile)
      : g_(generator),
        team_(team),
        w_(team.workspace),
        me_(member),
        interruption_(interruption),
        passes_(generator, team.workspace, member, asks ? &interruption : nullptr, profile) {}

  void project(const ProjectArgs& args, int64_t first, int rows) {
    const float radius = args.descent.radius;
    start(args, first, rows);
    if (radius > 0 && !args.velocities) passes_.scale_latent(radius);
    passes_.store_latent(g_);
    for (int step = 0; step < args.descent.steps; ++step) {
      if (me_.id == 0) team_.stops = interruption_.heard();
      passes_.forward(g_);
      if (team_.stops) return;
      passes_.image_gradient();
      passes_.backward();
      passes_.update(args.descent.rates[step], args.descent.momentum);
      if (radius > 0) passes_.scale_latent(radius);
      if (step + 1 < args.descent.steps) passes_.store_latent(g_);
    }
    write_results(args, first, rows);
  }

  void decode(const float* latents, float* images, int64_t first, int rows) {
    const int k = g_.plan.latent_size(), pixels = g_.pixels();
    if (me_.id == 0) {
      w_.prepare(rows, false);
      std::memcpy(w_.latent.data(), latents + first * k, size_t(rows) * k * 4);
    }
    me_.meet();
    exact_forward(rows);
    if (me_.id == 0)
      for (int row = 0; row < rows; ++row)
        std::memcpy(images + (first + row) * pixels, w_.image.floats() + int64_t(row) * g_.pixel_stride(),
                    size_t(pixels) * 4);
    me_.meet();
  }

 private:
  const PackedGenerator& g_;
  Team& team_;
  Workspace& w_;
  const Member& me_;
  const Interruption& interruption_;
  Passes passes_;

  // Brings the rows' starting points, velocities and targets.
  void start(const ProjectArgs& args, int64_t first, int rows) {
    const int k = g_.plan.latent_size(), pixels = g_.pixels(), stride = g_.pixel_stride();
    if (me_.id == 0) {
      w_.prepare(rows, g_.exact != nullptr);
      for (int row = 0; row < rows; ++row) {
        const int64_t image = (first + row) / args.restarts, restart = (first + row) % args.restarts;
        const int64_t start = (args.start_per_image ? image * args.restarts : 0) + restart;
        std::memcpy(w_.latent.floats() + int64_t(row) * k, args.start + start * k, size_t(k) * 4);
        std::memcpy(w_.target.floats() + int64_t(row) * stride, args.images + image * pixels, size_t(pixels) * 4);
      }
      if (args.velocities)
        std::memcpy(w_.velocity.data(), args.velocities + first * k, size_t(rows) * k * 4);
      else
        std::memset(w_.velocity.data(), 0, w_.velocity.size());
    }
    me_.meet();
    passes_.watch().latent();
    passes_.begin(rows);
  }

  // The images of the rows' latents by the float32 generator, whatever the precision.
  void exact_forward(int rows) {
    passes_.begin(rows);
    passes_.store_latent(g_.float32());
    passes_.forward(g_.float32());
    me_.meet();
  }

  // The error that picks the restart is that of the float32 generator.
  void write_results(const ProjectArgs& args, int64_t first, int rows) {
    const int64_t stride = g_.pixel_stride(), k = g_.plan.latent_size();
    exact_forward(rows);
    for (int row = me_.id; row < rows; row += me_.size)
      args.errors[first + row] =
          g_.set->image->error(w_.image.floats() + row * stride, w_.target.floats() + row * stride, g_.pixels());
    if (me_.id == 0) {
      std::memcpy(args.latents + first * k, w_.latent.data(), size_t(rows * k) * 4);
      if (args.velocities_out) std::memcpy(args.velocities_out + first * k, w_.velocity.data(), size_t(rows * k) * 4);
    }
    me_.meet();
  }
};

// What a working thread changes of its processor's state, and puts back: the caller's own thread is one of the team.
class ProcessorState {
 public:
  explicit ProcessorState(const InstructionSet& set) : set_(set), control_(float_control()) {
    // Numbers too small for float32's exponent become zero. A sigmoid that saturates makes many of them, and on some
    // processors an operation with one takes many times as long (docs/cpu.md).
    set_float_control(control_ | kFlushToZero | kDenormalsAreZero);
  }
  ProcessorState(const ProcessorState&) = delete;
  ~ProcessorState() {
    set_float_control(control_);
    if (set_.bfloat16->release) set_.bfloat16->release();
  }

 private:
  const InstructionSet& set_;
  const unsigned control_;
};

// Calls use(worker, first row, rows) for every group of rows, in all members of the team that takes it.
template <class Use>
void for_groups(const PackedGenerator& g, int64_t rows, int threads, int64_t max_rows, Profile* profile,
                const Use& use) {
  if (rows == 0) return;
  const Lease lease(threads);
  const Division division = divide(g, rows, lease.threads(), max_rows);
  const int size = lease.threads() / division.teams;
  std::vector<std::unique_ptr<Team>> teams;
  for (int t = 0; t < division.teams; ++t) teams.push_back(std::make_unique<Team>(g, division.group_rows, size));
  std::atomic<int64_t> next{0};
  Interruption interruption;
  run_threads(division.teams * size, interruption, [&](int thread) {
    Team& team = *teams[size_t(thread / size)];
    const Member member{thread % size, size, &team.barrier};
    const ProcessorState state(*g.set);
    Worker worker(g, team, member, interruption, thread == 0, profile);
    for (;;) {
      if (member.id == 0) team.group = interruption.heard() ? division.groups : next.fetch_add(1);
      member.meet();
      const int64_t group = team.group;
      if (group >= division.groups) break;
      const int64_t first = rows * group / division.groups, last = rows * (group + 1) / division.groups;
      use(worker, first, int(last - first));
    }
  });
}

}  // namespace

void project(const PackedGenerator& generator, const ProjectArgs& args) {
  for_groups(generator, args.images_count * args.restarts, args.threads, args.max_rows, args.profile,
             [&](Worker& worker, int64_t first, int rows) { worker.project(args, first, rows); });
}

void decode(const PackedGenerator& generator, const float* latents, int64_t count, int threads, int64_t max_rows,
            float* images) {
  for_groups(generator, count, threads, max_rows, nullptr,
             [&](Worker& worker, int64_t first, int rows) { worker.decode(latents, images, first, rows); });
}

}  // namespace defgan::cpu
