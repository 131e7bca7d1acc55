// A projection of which only some rows go on, as legs: each is a descent of its own, of fewer rows, from latents and
// velocities that the end of the one before has brought together. Nothing of it waits for the device.
#include <algorithm>

#include "params.h"
#include "queue.h"

namespace defgan::cuda {
namespace {

// The workspace's parts, in order: that of a leg's descent, then what legs hand on. A leg reads `next` and writes
// `ended`; what is kept of `ended` is the next leg's `next`.
struct Layout {
  size_t descent, ended_latents, ended_velocities, next_latents, next_velocities, errors, restarts[2], ranks, places,
      bytes;
};

Layout lay_out(const Program& program, const KeepingSchedule& s, int64_t images) {
  size_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const size_t here = at;
    at += size_t((bytes + 255) / 256 * 256);
    return here;
  };
  size_t descent = 0;
  for (const Schedule& leg : s.schedules) descent = std::max(descent, leg.workspace_bytes);
  const int64_t rows = images * s.legs.front().rows, line = program.plan.latent_size() * 4;
  const int64_t kept = s.legs.size() > 1 ? images * s.legs[1].rows : 0;  // at most
  Layout l{};
  l.descent = take(int64_t(descent));
  l.ended_latents = take(rows * line);
  l.ended_velocities = take(rows * line);
  l.next_latents = take(kept * line);
  l.next_velocities = take(kept * line);
  l.errors = take(rows * 4);
  for (size_t& restarts : l.restarts) restarts = take(kept * 4);
  l.ranks = take(rows * 4);
  l.places = take(rows * 4);
  l.bytes = at;
  return l;
}

}  // namespace

KeepingSchedule schedule_keeping(const Program& program, const Device& device, int64_t images, int restarts, int steps,
                                 const std::vector<Keep>& keep, int64_t max_rows, Mapping wanted) {
  KeepingSchedule s;
  s.legs = legs_of(steps, restarts, keep);
  for (const Leg& leg : s.legs)
    s.schedules.push_back(schedule_projection(program, device, images * leg.rows, max_rows, wanted));
  s.workspace_bytes = lay_out(program, s, images).bytes;
  return s;
}

void project_keeping(Queue& queue, const Program& program, const void* tables, const std::vector<Parameter>& parameters,
                     const KeepingSchedule& schedule, const ProjectArgs& args, int64_t* steps) {
  const Layout l = lay_out(program, schedule, args.images_count);
  char* const base = static_cast<char*>(args.workspace);
  const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  const auto numbers = [&](size_t offset) { return reinterpret_cast<int32_t*>(base + offset); };
  pack_weights(queue, program, tables, parameters, schedule.schedules.front(), base + l.descent);

  ProjectArgs part = args;
  part.workspace = base + l.descent;
  part.latents = floats(l.ended_latents);
  part.velocities_out = floats(l.ended_velocities);
  part.errors = floats(l.errors);
  for (size_t n = 0; n < schedule.legs.size(); ++n) {
    const Leg& leg = schedule.legs[n];
    const bool last = n + 1 == schedule.legs.size();
    if (n > 0) {
      part.start = floats(l.next_latents);
      part.start_per_image = true;
      part.velocities = floats(l.next_velocities);
    }
    part.restarts = leg.rows;
    part.descent.rates = args.descent.rates + leg.begin;
    part.descent.steps = leg.end - leg.begin;
    if (last) part.velocities_out = nullptr;
    descend(queue, program, tables, schedule.schedules[n], part);

    KeepParams p{};
    p.images = int32_t(args.images_count);
    p.rows = leg.rows;
    p.kept = last ? 0 : schedule.legs[n + 1].rows;
    p.latent_size = program.plan.latent_size();
    p.restarts = args.restarts;
    p.steps = leg.end;
    p.latents = part.latents;
    p.velocities = floats(l.ended_velocities);
    p.errors = part.errors;
    p.restart = n > 0 ? numbers(l.restarts[n % 2]) : nullptr;
    p.ranks = numbers(l.ranks);
    p.places = numbers(l.places);
    p.next_latents = floats(l.next_latents);
    p.next_velocities = floats(l.next_velocities);
    p.next_restart = numbers(l.restarts[(n + 1) % 2]);
    p.all_latents = args.latents;
    p.all_errors = args.errors;
    p.all_steps = steps;
    const int blocks = int(std::min<int64_t>(args.images_count, schedule.schedules[n].exact_blocks * 8));
    queue.launch({KernelId::kKeep, Precision::kFloat32, 0, &p, blocks, kKeepThreads, 0, false});
  }
}

}  // namespace defgan::cuda
